"""Out of memory: one sentence with the micro-batch that would fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unlabeled.errors import UserError
from unlabeled.planning import main_memory_bytes


@contextmanager
def user_error_on_out_of_memory(args, by_micro_batch: dict[int, int]) -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` that names a remedy.

    Args:
        by_micro_batch: estimate of the plan: {`per_device_train_batch_size`: bytes}.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in message:
            raise
        size = args.per_device_train_batch_size
        available = device_memory(args.device)
        fitting = [micro for micro, needed in by_micro_batch.items() if micro < size and needed <= 0.9 * available]
        remedy = "shorten max_length, set activation_checkpointing, or let ZeRO shard the optimizer"
        if fitting:
            micro = max(fitting)
            remedy = (
                f"lower per_device_train_batch_size from {size} to {micro}, which takes about "
                f"{by_micro_batch[micro] / 1e9:.1f} of {available / 1e9:.1f} GB; the batch stays the same"
            )
        raise UserError(f"memory ran out ({message.splitlines()[0][:120]}): {remedy}") from error


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return main_memory_bytes()
