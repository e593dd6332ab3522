"""Interrupted by `kill -9` and run again, a recipe ends with the same weights, bit for bit."""

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
from conftest import MODELS, ROOT, SPAN_MODELS, launch_environment, recipe_arguments, weights

from unlabeled.runtime.checkpoints import find_checkpoints, find_newest_checkpoint

STEPS = 40


def command(objective: str, corpus, tokenizers, output_dir, **options) -> list[str]:
    """A run of 40 steps with dropout, whose random state a resumed run has to find again, and a checkpoint every 4."""
    model_type = {"clm": "gpt2", "mlm": "bert", "span": "t5"}[objective]
    sizes = {name: 0.1 if "drop" in name else value for name, value in (MODELS | SPAN_MODELS)[model_type].items()}
    options = {
        "config_overrides": json.dumps(sizes), "train_tokens": STEPS * 256, "save_steps": 4, "save_total_limit": 3,
        "eval_strategy": "steps", "eval_steps": 10,
    } | options  # fmt: skip
    arguments = recipe_arguments(objective, model_type, corpus, tokenizers, output_dir, **options)
    return [sys.executable, str(ROOT / "recipes" / f"pretrain_{objective}.py"), *arguments]


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=launch_environment())
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def kill_after(arguments: list[str], output_dir: Path, step: int, delay: float) -> None:
    """Start a run and kill its whole process group `delay` seconds after the checkpoint of `step` is there."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    wanted = output_dir / f"checkpoint-{step}"
    while not wanted.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()[-3000:]
    assert not (output_dir / "metrics.json").exists(), "killed too late: the test would prove nothing"


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "model.safetensors").read_bytes()).hexdigest()


def test_another_order_of_batches_is_noticed(tmp_path):
    """By the comparison that the tests of resuming share; rows that two processes have divided are the same."""

    def write(name: str, *steps: tuple[int, list[str]]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(step) + "\n" for step in steps))
        return tmp_path / name[: name.rindex("-")]

    whole = write("whole-0", (1, ["a", "b"]), (2, ["c", "d"]), (3, ["e", "f"]))
    killed = write("killed-0", (1, ["a", "b"]), (2, ["c"]))
    assert_same_order(whole, killed, write("rest-0", (2, ["c", "d"]), (3, ["e"]), (3, ["f"])))
    write("two-0", (2, ["c"]), (3, ["e"]))
    assert_same_order(whole, write("two-1", (2, ["d"]), (3, ["f"])), first=2)
    for other in (
        [(2, ["d", "c"]), (3, ["e", "f"])],
        [(2, ["c", "d"]), (3, ["e", "c"])],
        [(2, ["c", "d"]), (3, ["e"])],
        [(3, ["e", "f"])],
    ):
        with pytest.raises(AssertionError):
            assert_same_order(whole, killed, write("other-0", *other))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "workers"), [("clm", 0), ("mlm", 0), ("mlm", 2), ("span", 2)])
def test_killed_and_resumed_is_bit_for_bit_the_same(objective, workers, corpus, tokenizers, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logs = [tmp_path / f"batches-of-{name}" for name in ("whole", "first", "second", "last")]
    run(recorded_command(command(objective, corpus, tokenizers, whole, dataloader_num_workers=workers), logs[0]))
    again = command(objective, corpus, tokenizers, killed, dataloader_num_workers=workers)
    kill_after(recorded_command(again, logs[1]), killed, step=8, delay=0.05)
    if workers == 0:  # twice, at another place
        kill_after(recorded_command(again, logs[2]), killed, step=20, delay=0.13)
    before = find_newest_checkpoint(str(killed))
    said = run(recorded_command(again, logs[3]))
    assert_same_order(*logs)
    assert f"resuming from {before}" in said
    assert digest(killed) == digest(whole)
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed))
    for key in ("eval_loss", "perplexity", "bits_per_byte", "restored_spans", "steps", "train_tokens"):
        assert first.get(key) == second.get(key), key
    histories = [
        [{k: v for k, v in entry.items() if k in ("step", "loss", "grad_norm", "eval_loss", "tokens")} for entry in log]
        for log in (
            json.loads(Path(find_checkpoints(str(folder))[0], "trainer_state.json").read_text())["log_history"]
            for folder in (whole, killed)
        )
    ]
    assert histories[0] == histories[1], "the whole loss curve survives, not only its end"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "zero"), [(1, 2, None), (2, 1, None), (2, 4, None), (2, 1, "zero2")])
def test_another_number_of_processes_continues(before, after, zero, corpus, tokenizers, tmp_path):
    """The same rows in the same order in batches of the same size, so the same weights but for the order of sums."""
    if zero:
        pytest.importorskip("deepspeed")
    moved = tmp_path / "moved"
    steps = {"train_tokens": 12 * 256, "save_steps": 4, "config_overrides": json.dumps(MODELS["gpt2"])}

    def launch(processes: int, folder: Path) -> str:
        words = command("clm", corpus, tokenizers, folder, **steps, per_device_train_batch_size=8 // processes)
        words += ["--deepspeed", str(ROOT / "ds_configs" / f"{zero}.json")] if zero else []
        words = recorded_command(words, tmp_path / f"batches-of-{processes}")
        return run(
            [words[0], "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words[1:]]
        )

    launch(before, moved)
    expected = weights(moved)
    for path in [moved / "checkpoint-12", moved / "checkpoint-8"]:
        shutil.rmtree(path)
    for path in [moved / "metrics.json", moved / "model.safetensors"]:
        path.unlink()
    said = launch(after, moved)
    assert f"resuming from {moved}/checkpoint-4" in said
    assert f"saved by {before} processes, continued by {after}" in said
    assert_same_order(tmp_path / f"batches-of-{before}", tmp_path / f"batches-of-{after}", first=5)
    assert json.loads((moved / "metrics.json").read_text())["steps"] == 12
    assert not (moved / "incomplete").exists()
    for name, tensor in weights(moved).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
