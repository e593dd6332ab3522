"""Containers that share folders, in which every process has the process id 1, killed at any moment."""

from pathlib import Path

import pytest
import torch
from conftest import recipe_arguments, run_recipe, weights
from containers import Container, skip_without_namespaces

skip_without_namespaces()
pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PHASES = {
    "preparing": "unlabeled.data.preparing:_write_documents",
    "prepared but not renamed": "unlabeled.runtime.staging:commit_folder",
    "training": "unlabeled.training:ExactTrainer.training_step",
    "saving": "unlabeled.training.saving:commit_checkpoint",
    "exporting": "unlabeled.training.trainer:write_results",
}
OPTIONS = {"save_steps": 2, "save_strategy": "steps"}


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.incomplete-*"))


def assert_equal_weights(first: Path, second: Path) -> None:
    expected = weights(first)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())


def test_pretraining_killed_in_every_phase(corpus, tokenizers, tmp_path):
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "whole", **OPTIONS))
    prepared = tmp_path / "prepared"
    options = OPTIONS | {"prepared_dir": prepared}
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", **options)
    for number, function in enumerate(PHASES.values()):
        container = Container("recipes/pretrain_clm.py", arguments, tmp_path / f"{number}.log", stop_at=function)
        container.wait_until_stopped()
        container.kill()
        assert bool(leftovers(prepared)) == (number < 2)
    output = Container("recipes/pretrain_clm.py", arguments, tmp_path / "last.log").finish()
    assert "resuming from" in output
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")


def tokenizer_arguments(corpus, folder: Path) -> list[str]:
    return ["--data", corpus["train"], "--algorithm", "bpe", "--vocab_size", "300", "--output_dir", str(folder)]


def preparation_arguments(corpus, tokenizer: Path, folder: Path) -> list[str]:
    options = {
        "objective": "clm", "model_type": "llama", "tokenizer_name_or_path": tokenizer, "train_data": corpus["train"],
        "eval_data": corpus["validation"], "max_length": 32, "prepared_dir": folder, "output_dir": folder / "unused",
        "train_tokens": 256, "batch_tokens": 256, "per_device_train_batch_size": 8, "use_cpu": "true",
    }  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("script", ["train_tokenizer", "prepare_data"])
def test_folder_shared_by_two_containers(script, corpus, tokenizers, tmp_path):
    """The first container is killed; of the next two, one waits for the other and finds its folder."""
    folder = tmp_path / "shared"
    if script == "train_tokenizer":
        arguments = tokenizer_arguments(corpus, folder / "tokenizer")
    else:
        arguments = preparation_arguments(corpus, tokenizers["clm"], folder)

    def start(name: str, stop_at: str | None = None) -> Container:
        return Container(f"scripts/{script}.py", arguments, tmp_path / f"{name}.log", stop_at)

    killed = start("killed", stop_at="unlabeled.runtime.staging:commit_folder")
    killed.wait_until_stopped()
    killed.kill()
    assert len(leftovers(folder)) == 1
    first = start("first", stop_at="unlabeled.runtime.staging:commit_folder")
    first.wait_until_stopped()
    assert len(leftovers(folder)) == 1, "the leftovers of the killed container are removed"
    second = start("second")
    second.wait_for_output("waiting for another process that writes")
    first.go()
    first_output, second_output = first.finish(), second.finish()
    assert not leftovers(folder)
    if script == "train_tokenizer":
        assert "already there" in second_output and "already there" not in first_output
    else:
        assert second_output.splitlines()[1:] == first_output.splitlines()


def test_prepared_text_shared_by_two_runs(corpus, tokenizers, tmp_path):
    options = OPTIONS | {"prepared_dir": tmp_path / "prepared"}

    def start(name: str, stop_at: str | None = None) -> Container:
        arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / name, **options)
        return Container("recipes/pretrain_clm.py", arguments, tmp_path / f"{name}.log", stop_at)

    first = start("first", stop_at="unlabeled.data.preparing:_write_documents")
    first.wait_until_stopped()
    second = start("second")
    second.wait_for_output("waiting for another process that writes")
    first.go()
    first.finish()
    second.finish()
    assert_equal_weights(tmp_path / "first", tmp_path / "second")
    assert not leftovers(tmp_path)
