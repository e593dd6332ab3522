"""A `UserError` for a write that failed, such as on a full disk."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from unlabeled.errors import UserError
from unlabeled.runtime.checkpoints import find_newest_checkpoint

# Messages of torch.save, which raises a RuntimeError without the reason.
TORCH_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")


@contextmanager
def user_error_on_failed_write(output_dir: str, content: str) -> Iterator[None]:
    """Raise a `UserError` for a write to disk that failed; other errors pass through.

    Args:
        output_dir: The folder of the run, whose last complete checkpoint the message names.
        content: What is written, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = find_write_failure(error)
        if reason is None:
            raise
        checkpoint = find_newest_checkpoint(output_dir, report=lambda line: None)
        raise UserError(
            f"cannot write {content} to {output_dir} ({reason}); the last complete checkpoint is "
            f"{checkpoint or 'none'}: make room and run the same command again"
        ) from error


def find_write_failure(error: Exception) -> str | None:
    """The reason why a write failed, or None if the error is about something else."""
    if isinstance(error, OSError) and error.errno:  # those of the Hub have no errno
        return error.strerror
    match = re.search(r"([\w ]+) \(os error \d+\)", str(error))  # safetensors and tokenizers, which are Rust
    if match:
        return match[1].strip()
    if any(name in str(error) for name in TORCH_WRITE_ERRORS):
        return "the disk is full, or the file larger than allowed"
    return None
