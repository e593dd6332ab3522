"""A checkpoint is whole or absent, and a folder belongs to one run."""

import json
import os
from pathlib import Path

import pytest

from unlabeled.runtime.checkpoints import (
    acquire_output_dir,
    commit_checkpoint,
    find_checkpoint_defect,
    find_checkpoints,
    keep_newest,
    newest_complete,
    staging_folder,
)


def stage(output_dir: Path, step: int, files: dict[str, bytes] | None = None) -> str:
    """Write and publish a small checkpoint."""
    name = f"checkpoint-{step}"
    staged = Path(staging_folder(str(output_dir)), name)
    (staged / "global").mkdir(parents=True)
    for file, content in (files or {"model.safetensors": b"weights", "global/shard": b"state"}).items():
        (staged / file).write_bytes(content)
    return commit_checkpoint(str(output_dir), name)


def test_the_newest_complete_one_is_found_by_number_not_by_name_or_time(tmp_path):
    for step in (100, 9, 20):
        stage(tmp_path, step)
    assert newest_complete(str(tmp_path)) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda folder: os.truncate(folder / "model.safetensors", 3), "model.safetensors has 3 bytes, not 7"),
    (lambda folder: (folder / "global/shard").unlink(), "global/shard is missing"),
    (lambda folder: (folder / "complete.json").unlink(), "it has no readable complete.json"),
    (lambda folder: (folder / "complete.json").write_text("{"), "it has no readable complete.json"),
    (lambda folder: (folder / "complete.json").write_text('{"global/shard": 5}'), "it has no readable complete.json"),
    (lambda folder: (folder / "global/shard").write_bytes(b"stath"), "global/shard has changed since it was written"),
])  # fmt: skip
def test_a_torn_one_is_named_and_skipped(tmp_path, damage, reason):
    stage(tmp_path, 10)
    torn = Path(stage(tmp_path, 20))
    assert find_checkpoint_defect(torn) is None
    damage(torn)
    said = []
    assert newest_complete(str(tmp_path), said.append) == str(tmp_path / "checkpoint-10")
    assert said == [f"skipped {torn}: {reason}"]


def test_one_that_is_being_written_is_no_checkpoint(tmp_path):
    stage(tmp_path, 10)
    half = Path(staging_folder(str(tmp_path)), "checkpoint-20")
    half.mkdir(parents=True)
    said = []
    assert newest_complete(str(tmp_path), said.append) == str(tmp_path / "checkpoint-10")
    assert "being written" in said[0]


def test_publishing_again_replaces_a_torn_one(tmp_path):
    torn = Path(stage(tmp_path, 10))
    (torn / "complete.json").unlink()
    stage(tmp_path, 10, {"model.safetensors": b"new"})
    assert (torn / "model.safetensors").read_bytes() == b"new" and find_checkpoint_defect(torn) is None


def test_only_complete_ones_are_counted_when_old_ones_are_deleted(tmp_path):
    for step in (10, 20, 30, 40):
        stage(tmp_path, step)
    (tmp_path / "checkpoint-40" / "complete.json").unlink()
    keep_newest(str(tmp_path), 2)
    assert [path[-2:] for path in find_checkpoints(str(tmp_path))] == ["40", "30", "20"]
    keep_newest(str(tmp_path), None)
    assert len(find_checkpoints(str(tmp_path))) == 3


def test_a_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "run"
    assert acquire_output_dir(str(folder), {"seed": 1}) is False
    assert acquire_output_dir(str(folder), {"seed": 1}) is False, "the same run again resumes"
    (folder / "metrics.json").write_text("{}")
    assert acquire_output_dir(str(folder), {"seed": 1}) is True, "and is not trained again once finished"
    assert json.loads((folder / "run.json").read_text()) == {"seed": 1}
