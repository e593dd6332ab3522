"""A run that is killed and resumed ends with the weights of an uninterrupted run, bit for bit."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from batch_log import assert_same_order, recorded_command
from conftest import MODELS, ROOT, SPAN_MODELS, history, launch_environment, recipe_arguments, weights

from unlabeled.runtime.checkpoints import find_newest_checkpoint

STEPS = 40


def command(objective: str, corpus, tokenizers, output_dir, **options) -> list[str]:
    """A run of 40 steps with a checkpoint every 4, and with dropout, so that the random state matters."""
    model_type = {"clm": "gpt2", "mlm": "bert", "span": "t5"}[objective]
    sizes = {name: 0.1 if "drop" in name else value for name, value in (MODELS | SPAN_MODELS)[model_type].items()}
    options = {
        "config_overrides": json.dumps(sizes), "train_tokens": STEPS * 256, "save_steps": 4, "save_total_limit": 3,
        "eval_strategy": "steps", "eval_steps": 10,
    } | options  # fmt: skip
    arguments = recipe_arguments(objective, model_type, corpus, tokenizers, output_dir, **options)
    return [sys.executable, str(ROOT / "recipes" / f"pretrain_{objective}.py"), *arguments]


def run(command: list[str]) -> str:
    """Run a command and return its output."""
    result = subprocess.run(command, capture_output=True, text=True, env=launch_environment())
    assert result.returncode == 0, result.stderr[-9000:]
    return result.stdout


def kill_after(command: list[str], output_dir: Path, step: int, delay: float) -> None:
    """Start a run and kill its process group `delay` seconds after the checkpoint of `step` appears."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=environment
    )
    checkpoint = output_dir / f"checkpoint-{step}"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()[-3000:]
    assert not (output_dir / "metrics.json").exists(), "killed too late for the test"


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "model.safetensors").read_bytes()).hexdigest()


def test_comparison_of_batch_orders(tmp_path):
    """`assert_same_order` accepts rows that two processes share, and rejects every other order."""

    def write(name: str, *steps: tuple[int, list[str]]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(step) + "\n" for step in steps))
        return tmp_path / name[: name.rindex("-")]

    whole = write("whole-0", (1, ["a", "b"]), (2, ["c", "d"]), (3, ["e", "f"]))
    killed = write("killed-0", (1, ["a", "b"]), (2, ["c"]))
    assert_same_order(whole, killed, write("rest-0", (2, ["c", "d"]), (3, ["e"]), (3, ["f"])))
    write("two-0", (2, ["c"]), (3, ["e"]))
    assert_same_order(whole, write("two-1", (2, ["d"]), (3, ["f"])), first=2)
    for wrong_order in (
        [(2, ["d", "c"]), (3, ["e", "f"])],
        [(2, ["c", "d"]), (3, ["e", "c"])],
        [(2, ["c", "d"]), (3, ["e"])],
        [(3, ["e", "f"])],
    ):
        with pytest.raises(AssertionError):
            assert_same_order(whole, killed, write("other-0", *wrong_order))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "workers"), [("clm", 0), ("mlm", 0), ("mlm", 2), ("span", 2)])
def test_weights_after_kill(objective, workers, corpus, tokenizers, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logs = [tmp_path / f"batches-of-{name}" for name in ("whole", "first", "second", "last")]
    run(recorded_command(command(objective, corpus, tokenizers, whole, dataloader_num_workers=workers), logs[0]))
    resumed = command(objective, corpus, tokenizers, killed, dataloader_num_workers=workers)
    kill_after(recorded_command(resumed, logs[1]), killed, step=8, delay=0.05)
    if workers == 0:  # once more, at another step
        kill_after(recorded_command(resumed, logs[2]), killed, step=20, delay=0.13)
    checkpoint = find_newest_checkpoint(str(killed))
    output = run(recorded_command(resumed, logs[3]))
    assert_same_order(*logs)
    assert f"resuming from {checkpoint}" in output
    assert digest(killed) == digest(whole)
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed))
    for key in ("eval_loss", "perplexity", "bits_per_byte", "restored_spans", "steps", "train_tokens"):
        assert first.get(key) == second.get(key), key
    assert loss_curve(killed) == loss_curve(whole)


def loss_curve(output_dir: Path) -> list[dict]:
    """The log of a run, without times."""
    keys = ("step", "loss", "grad_norm", "eval_loss", "tokens")
    return [{key: entry[key] for key in keys if key in entry} for entry in history(output_dir)]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "zero"), [(1, 2, None), (2, 1, None), (2, 4, None), (2, 1, "zero2")])
def test_resume_with_other_world_size(before, after, zero, corpus, tokenizers, tmp_path):
    """The batches are equal, so the weights are equal up to the order of sums."""
    if zero:
        pytest.importorskip("deepspeed")
    output_dir = tmp_path / "moved"
    steps = {"train_tokens": 12 * 256, "save_steps": 4, "config_overrides": json.dumps(MODELS["gpt2"])}

    def launch(processes: int, folder: Path) -> str:
        recipe = command("clm", corpus, tokenizers, folder, **steps, per_device_train_batch_size=8 // processes)
        if zero:
            recipe += ["--deepspeed", str(ROOT / "ds_configs" / f"{zero}.json")]
        python, *arguments = recorded_command(recipe, tmp_path / f"batches-of-{processes}")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return run([python, *launcher, *arguments])

    launch(before, output_dir)
    expected = weights(output_dir)
    for path in [output_dir / "checkpoint-12", output_dir / "checkpoint-8"]:
        shutil.rmtree(path)
    for path in [output_dir / "metrics.json", output_dir / "model.safetensors"]:
        path.unlink()
    output = launch(after, output_dir)
    assert f"resuming from {output_dir}/checkpoint-4" in output
    assert f"saved by {before} processes, continued by {after}" in output
    assert_same_order(tmp_path / f"batches-of-{before}", tmp_path / f"batches-of-{after}", first=5)
    assert json.loads((output_dir / "metrics.json").read_text())["steps"] == 12
    assert not (output_dir / "incomplete").exists()
    for name, tensor in weights(output_dir).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
