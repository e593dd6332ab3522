"""Records which rows each step of a run trains on, and compares the order of batches of several runs.

    python tests/batch_log.py LOG recipes/RECIPE.py --KEY VALUE ...

runs a recipe as a script, also under torchrun, and records its batches in LOG-RANK.
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
    """A hash of each row of a batch: of its ids and of all other tensors with as many rows, such as the labels."""
    tensors = {key: value for key, value in sorted(inputs.items()) if isinstance(value, torch.Tensor) and value.ndim}
    row_count = next(len(value) for key, value in tensors.items() if key.endswith("input_ids"))
    arrays = [value.cpu().contiguous().numpy() for value in tensors.values() if len(value) == row_count]
    hashes = []
    for row in range(row_count):
        content = b"".join(array[row].tobytes() for array in arrays)
        hashes.append(hashlib.sha256(content).hexdigest()[:16])
    return hashes


@contextmanager
def recorded_batches(log: Path) -> Iterator[None]:
    """Append a line to the log for each micro-batch of a trainer: its step and the hashes of its rows."""
    from unlabeled.training import ExactTrainerMixin

    original = ExactTrainerMixin.training_step
    file = Path(f"{log}-{os.environ.get('RANK', '0')}")

    def training_step(self, model, inputs, *args, **kwargs):
        with file.open("a") as handle:  # closed at once, as the process may be killed
            handle.write(json.dumps([self.state.global_step + 1, row_hashes(inputs)]) + "\n")
        return original(self, model, inputs, *args, **kwargs)

    ExactTrainerMixin.training_step = training_step
    try:
        yield
    finally:
        ExactTrainerMixin.training_step = original


def read_batches(log: Path) -> dict[int, list[str]]:
    """{step: hashes of its rows}, in the order in which a single process would read them.

    That is the first micro-batch of each rank, then the second of each rank, and so on.
    """
    micro_batches: dict[int, list[tuple[int, int, list[str]]]] = {}  # step: [(index within the step, rank, rows)]
    for rank, file in enumerate(sorted(log.parent.glob(f"{log.name}-[0-9]"))):
        index_of_step: dict[int, int] = {}
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            index = index_of_step.get(step, 0)
            index_of_step[step] = index + 1
            micro_batches.setdefault(step, []).append((index, rank, rows))
    rows_of_step = {}
    for step in sorted(micro_batches):
        rows_of_step[step] = [row for _, _, rows in sorted(micro_batches[step]) for row in rows]
    return rows_of_step


def recorded_command(command: list[str], log: Path) -> list[str]:
    """The command `python RECIPE ...`, with a log of its batches."""
    python, *arguments = command
    return [python, str(Path(__file__)), str(log), *arguments]


def assert_same_order(whole: Path, *attempts: Path, first: int = 1) -> None:
    """Check that interrupted runs trained on the same rows in the same order as an uninterrupted run.

    Args:
        whole: log of the uninterrupted run.
        attempts: logs of the interrupted runs, in order. The last step of an attempt may be incomplete.
        first: the first step of the attempts.
    """
    expected = read_batches(whole)
    assert len({tuple(rows) for rows in expected.values()}) > len(expected) / 2, "most batches are equal"
    trained: dict[int, list[str]] = {}
    for attempt in attempts:
        batches = read_batches(attempt)
        for step, rows in batches.items():
            expected_rows = expected[step]
            if step == max(batches):
                expected_rows = expected_rows[: len(rows)]
            assert rows == expected_rows, f"step {step} of {attempt.name}"
        trained |= batches
    assert trained == {step: rows for step, rows in expected.items() if step >= first}


if __name__ == "__main__":
    log, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    with recorded_batches(Path(log)):
        runpy.run_path(script, run_name="__main__")
