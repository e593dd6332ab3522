"""A checkpoint is complete or absent, and an output folder belongs to one run."""

import json
import os
from pathlib import Path

import pytest

from unlabeled.runtime.checkpoints import (
    commit_checkpoint,
    delete_old_checkpoints,
    find_checkpoint_defect,
    find_checkpoints,
    find_newest_checkpoint,
    staging_folder,
)
from unlabeled.runtime.output_dir import acquire_output_dir

FILES = {"model.safetensors": b"weights", "global/shard": b"state"}


def write_checkpoint(output_dir: Path, step: int, files: dict[str, bytes] = FILES) -> str:
    """Stage and commit a small checkpoint."""
    name = f"checkpoint-{step}"
    staged = Path(staging_folder(str(output_dir)), name)
    (staged / "global").mkdir(parents=True)
    for file, content in files.items():
        (staged / file).write_bytes(content)
    return commit_checkpoint(str(output_dir), name)


def test_newest_checkpoint(tmp_path):
    """The order is that of the numbers, not of names or times."""
    for step in (100, 9, 20):
        write_checkpoint(tmp_path, step)
    assert find_newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda folder: os.truncate(folder / "model.safetensors", 3), "model.safetensors has 3 bytes, not 7"),
    (lambda folder: (folder / "global/shard").unlink(), "global/shard is missing"),
    (lambda folder: (folder / "complete.json").unlink(), "it has no readable complete.json"),
    (lambda folder: (folder / "complete.json").write_text("{"), "it has no readable complete.json"),
    (lambda folder: (folder / "complete.json").write_text('{"global/shard": 5}'), "it has no readable complete.json"),
    (lambda folder: (folder / "global/shard").write_bytes(b"stath"), "global/shard has changed since it was written"),
])  # fmt: skip
def test_damaged_checkpoint_is_skipped(tmp_path, damage, reason):
    write_checkpoint(tmp_path, 10)
    damaged = Path(write_checkpoint(tmp_path, 20))
    assert find_checkpoint_defect(damaged) is None
    damage(damaged)
    lines = []
    assert find_newest_checkpoint(str(tmp_path), lines.append) == str(tmp_path / "checkpoint-10")
    assert lines == [f"skipped {damaged}: {reason}"]


def test_staged_checkpoint_is_skipped(tmp_path):
    write_checkpoint(tmp_path, 10)
    staged = Path(staging_folder(str(tmp_path)), "checkpoint-20")
    staged.mkdir(parents=True)
    lines = []
    assert find_newest_checkpoint(str(tmp_path), lines.append) == str(tmp_path / "checkpoint-10")
    assert "being written" in lines[0]


def test_damaged_checkpoint_is_replaced(tmp_path):
    checkpoint = Path(write_checkpoint(tmp_path, 10))
    (checkpoint / "complete.json").unlink()
    write_checkpoint(tmp_path, 10, {"model.safetensors": b"new"})
    assert (checkpoint / "model.safetensors").read_bytes() == b"new"
    assert find_checkpoint_defect(checkpoint) is None


def test_deletion_of_old_checkpoints(tmp_path):
    """Only complete checkpoints count."""
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-40" / "complete.json").unlink()
    delete_old_checkpoints(str(tmp_path), 2)
    assert [path[-2:] for path in find_checkpoints(str(tmp_path))] == ["40", "30", "20"]
    delete_old_checkpoints(str(tmp_path), None)
    assert len(find_checkpoints(str(tmp_path))) == 3


def test_best_checkpoint_is_kept(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    delete_old_checkpoints(str(tmp_path), 1, best="checkpoint-10")
    assert [path[-2:] for path in find_checkpoints(str(tmp_path))] == ["30", "10"]


def test_output_dir_of_one_run(tmp_path):
    """The same run resumes until it has finished."""
    folder = tmp_path / "run"
    assert acquire_output_dir(str(folder), {"seed": 1}) is False
    assert acquire_output_dir(str(folder), {"seed": 1}) is False
    (folder / "metrics.json").write_text("{}")
    assert acquire_output_dir(str(folder), {"seed": 1}) is True
    assert json.loads((folder / "run.json").read_text()) == {"seed": 1}
