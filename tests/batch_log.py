"""The order of batches: which rows each step of a run has trained on, recorded while it runs and compared afterwards.

    python tests/batch_log.py LOG recipes/RECIPE.py --KEY VALUE ...

runs a recipe as a script, also below torchrun, and records into LOG-RANK.
"""

import hashlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def row_hashes(inputs: dict) -> list[str]:
    """A hash of each row of a batch: of its ids, and of all tensors that have as many rows, such as the labels."""
    tensors = {key: value for key, value in sorted(inputs.items()) if isinstance(value, torch.Tensor) and value.ndim}
    count = next(len(value) for key, value in tensors.items() if key.endswith("input_ids"))
    rows = [value.cpu().contiguous().numpy() for value in tensors.values() if len(value) == count]
    return [hashlib.sha256(b"".join(part[row].tobytes() for part in rows)).hexdigest()[:16] for row in range(count)]


@contextmanager
def recorded_batches(log: Path) -> Iterator[None]:
    """Append a line for each micro-batch that a trainer of the project takes: its step and the hashes of its rows."""
    from unlabeled.training import ExactTrainerMixin

    right = ExactTrainerMixin.training_step
    file = Path(f"{log}-{os.environ.get('RANK', '0')}")

    def training_step(self, model, inputs, *args, **kwargs):
        with file.open("a") as handle:  # flushed at once: the process may be killed
            handle.write(json.dumps([self.state.global_step + 1, row_hashes(inputs)]) + "\n")
        return right(self, model, inputs, *args, **kwargs)

    ExactTrainerMixin.training_step = training_step
    try:
        yield
    finally:
        ExactTrainerMixin.training_step = right


def read_batches(log: Path) -> dict[int, list[str]]:
    """{step: hashes of its rows}, in the order in which one process would be given them."""
    steps: dict[int, list[tuple[int, int, list[str]]]] = {}
    for rank, file in enumerate(sorted(log.parent.glob(f"{log.name}-[0-9]"))):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            batches = steps.setdefault(step, [])
            batches.append((sum(other == rank for _, other, _ in batches), rank, rows))
    return {step: [row for *_, rows in sorted(batches) for row in rows] for step, batches in sorted(steps.items())}


def recorded_command(command: list[str], log: Path) -> list[str]:
    """The command `python SCRIPT ...` of a recipe, such that its batches are recorded."""
    python, *words = command
    return [python, str(Path(__file__)), str(log), *words]


def assert_same_order(whole: Path, *attempts: Path, first: int = 1) -> None:
    """Together the attempts have trained on what an uninterrupted run has: in each step the same rows in one order.

    Of the step in which an attempt was killed the first rows are compared.

    Args:
        first: the first step that the attempts had to take.
    """
    expected, found = read_batches(whole), {}
    assert len({tuple(rows) for rows in expected.values()}) > len(expected) / 2, "batches differ from each other"
    for attempt in attempts:
        batches = read_batches(attempt)
        for step, rows in batches.items():
            last = step == max(batches)
            assert rows == expected[step][: len(rows) if last else None], f"step {step} of {attempt.name}"
        found |= batches
    assert found == {step: rows for step, rows in expected.items() if step >= first}


if __name__ == "__main__":
    log, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    with recorded_batches(Path(log)):
        runpy.run_path(script, run_name="__main__")
