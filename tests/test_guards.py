"""A run that is interrupted, spoilt or stuck ends whole, in one sentence, and goes on exactly."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, free_ports, recipe_arguments, run_recipe, weights
from transformers import TrainerState

from unlabeled import Stopped, UserError
from unlabeled.checkpoints import find_checkpoints, newest_complete
from unlabeled.losses import LossAtTargets
from unlabeled.training import guards
from unlabeled.training.guards import (
    SKIPS,
    Preemption,
    Watchdog,
    count_skipped,
    device_memory,
    explained_memory,
    usable,
)

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS = 60


def arguments(corpus, tokenizers, folder, **options) -> list[str]:
    options = {"train_tokens": STEPS * 256, "save_strategy": "no"} | options
    return recipe_arguments("clm", "llama", corpus, tokenizers, folder, **options)


def start(words: list[str], processes: int = 1, environment: dict | None = None) -> subprocess.Popen:
    """A run of the causal recipe whose output can be read line by line."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "recipes" / "pretrain_clm.py"), *words]
    environment = ENVIRONMENT | (environment or {})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def after_step(process: subprocess.Popen, step: int) -> None:
    """Wait until a run has reported a step."""
    for line in process.stdout:
        if line.startswith("step") and int(line[4:].split("/")[0].replace(",", "")) >= step:
            return
    raise AssertionError(process.stderr.read()[-3000:])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0), (signal.SIGINT, 2)])
def test_a_signal_saves_the_step_and_the_same_command_continues(number, workers, corpus, tokenizers, tmp_path):
    """To the whole process group, as Ctrl-C and Slurm send it; workers of the data loader are in it."""
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path / "whole"))
    words = arguments(corpus, tokenizers, tmp_path / "stopped", dataloader_num_workers=workers)
    process = start(words)
    after_step(process, 5)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == Stopped.STATUS
    reached = int(Path(newest_complete(str(tmp_path / "stopped"))).name.removeprefix("checkpoint-"))
    assert f"stopped: {number.name} ended the run after step {reached} of {STEPS}; it is saved" in said
    assert "Traceback" not in said
    run_recipe("pretrain_clm", words)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_processes_stop_at_the_same_step(corpus, tokenizers, tmp_path):
    """The signal reaches one process only; torchrun itself gives its own status for every failure."""
    words = arguments(corpus, tokenizers, tmp_path / "stopped", per_device_train_batch_size=4)
    process = start(words, processes=2)
    after_step(process, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0 and "SIGUSR1 ended the run after step" in said
    saved = newest_complete(str(tmp_path / "stopped"))
    process = start(words, processes=2)
    output, said = process.communicate(timeout=100)
    assert process.returncode == 0, said[-3000:]
    assert f"resuming from {saved}" in output
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path / "whole"))
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_time_that_is_up(corpus, tokenizers, tmp_path):
    words = arguments(corpus, tokenizers, tmp_path, train_tokens=4 * 256)
    with pytest.raises(Stopped, match="max_hours ended the run after step 1 of 4"):
        run_recipe("pretrain_clm", [*words, "--max_hours", "1e-9"])
    assert [Path(path).name for path in find_checkpoints(str(tmp_path))] == ["checkpoint-1"]
    run_recipe("pretrain_clm", words)
    assert (tmp_path / "metrics.json").exists()


def test_handlers_are_put_back_and_a_second_signal_is_final(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    preemption, killed = Preemption(None), []
    preemption.on_train_begin(None, None, None)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    os_signal = signal.getsignal(signal.SIGTERM)
    os_signal(signal.SIGTERM, None)
    os_signal(signal.SIGTERM, None)  # a launcher's, of the same wish
    assert not killed and preemption.noticed == signal.SIGTERM
    preemption.since -= 6
    os_signal(signal.SIGTERM, None)
    assert killed == [signal.SIGTERM]
    preemption.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_which_gradients_are_usable(capsys, tmp_path):
    args = SimpleNamespace(max_grad_rise=10.0, output_dir=str(tmp_path))
    state = TrainerState(log_history=[{"grad_norm": norm} for norm in (1.0, 2.0, 3.0, 2.0)], global_step=6)
    assert usable(1e6, args, state), "four norms do not say what is usual"
    assert not usable(float("nan"), args, state) and not usable(float("inf"), args, state)
    state.log_history += [{"grad_norm": float("inf")}, {"grad_norm": 2.0}]
    assert usable(20.0, args, state) and not usable(20.1, args, state)
    args.max_grad_rise = 0
    assert usable(1e9, args, state) and not usable(float("inf"), args, state)
    for number in range(1, SKIPS + 1):
        assert count_skipped(20.1, args, state) == number
        assert "step      7 left out: the norm of its gradients is 20.1" in capsys.readouterr().out
        state.log_history.append({"skipped_steps": number, "step": 6})
    with pytest.raises(
        UserError, match=r"11 of the last 1000 steps were not usable.*; the last good checkpoint is none"
    ):
        count_skipped(20.1, args, state)
    state.global_step += 2000
    assert count_skipped(20.1, args, state) == 11, "those are long ago"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_step_that_is_left_out_changes_nothing(optimizer, logging_steps, corpus, tokenizers, tmp_path, monkeypatch):
    """Neither weights nor moments nor their counts; and its loss, NaN here, is in no figure."""
    right, calls, seen = LossAtTargets.__call__, [], {}

    def loss(self, outputs, labels, num_items_in_batch=1):
        nats = right(self, outputs, labels, num_items_in_batch)
        if num_items_in_batch != 1:  # not in evaluation
            calls.append(nats.item())
            nats = nats * (float("nan") if len(calls) == 2 else 1.0)
        return nats

    def look(self, args, state, control, model=None, optimizer=None, **kwargs):
        moments = [value.clone() for group in optimizer.state.values() for value in group.values()]
        seen[state.global_step] = [parameter.detach().clone() for parameter in model.parameters()] + moments

    monkeypatch.setattr(LossAtTargets, "__call__", loss)
    monkeypatch.setattr(Watchdog, "on_step_end", look)
    monkeypatch.setattr(Watchdog, "on_train_begin", lambda *args, **kwargs: None)
    options = {"train_tokens": 3 * 256, "optimizer": optimizer, "logging_steps": logging_steps}
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path, **options))
    assert all(map(torch.equal, seen[1], seen[2]))
    assert not all(map(torch.equal, seen[2], seen[3]))
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped_steps"] == 1
    losses = [entry["loss"] for entry in json.loads((tmp_path / "history.json").read_text()) if "loss" in entry]
    expected = [calls[0], calls[2]] if logging_steps == 1 else [(calls[0] + calls[2]) / 2]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_memory_that_runs_out(monkeypatch):
    """The micro-batch that is named fits by the plan, with a tenth to spare."""
    monkeypatch.setattr(guards, "device_memory", lambda device: 10 * 10**9)
    args = SimpleNamespace(per_device_train_batch_size=8, device=torch.device("cpu"))
    plan = {1: 3 * 10**9, 2: 5 * 10**9, 4: 9 * 10**9 + 1, 8: 17 * 10**9}
    sentence = r"per_device_train_batch_size from 8 to 2, which takes about 5\.0 of 10\.0 GB"
    with pytest.raises(UserError, match=sentence), explained_memory(args, plan):
        torch.empty(2**60)
    args.per_device_train_batch_size = 1
    with pytest.raises(UserError, match="shorten max_length"), explained_memory(args, plan):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="something else"), explained_memory(args, plan):
        raise RuntimeError("something else")
    assert 10**9 < device_memory(torch.device("cpu")) < 10**15


@pytest.mark.slow
def test_a_process_that_is_gone_ends_the_others(corpus, tokenizers, tmp_path):
    """Without a launcher that would end them: each says that it has lost another one."""
    words = arguments(corpus, tokenizers, tmp_path, per_device_train_batch_size=4)
    (port,) = free_ports(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (
        start(words, environment=address | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}) for rank in "01"
    )
    after_step(first, 5)
    second.kill()
    _, said = first.communicate(timeout=60)
    assert first.returncode == Stopped.STATUS
    assert "stopped: process 0 has lost another one" in said and "the same command continues" in said
    second.communicate()


def test_what_stands_still_is_ended():
    code = """
import time
from types import SimpleNamespace
from transformers import TrainerState
from unlabeled.training.guards import Watchdog
dog = Watchdog()
dog.on_train_begin(SimpleNamespace(ddp_timeout=2), TrainerState(global_step=7), None)
def a_data_loader_that_waits():
    time.sleep(60)
a_data_loader_that_waits()
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == Stopped.STATUS and time.monotonic() - begun < 50
    assert "nothing has happened for 2 s (ddp_timeout) after step 7" in done.stderr
    assert "a_data_loader_that_waits" in done.stderr


def test_what_is_saved_on_a_signal_is_looked_at_first(corpus, tokenizers, tmp_path, monkeypatch):
    """Weights that are no longer finite are not saved because the time is up."""
    from unlabeled.training import ExactTrainer

    step = ExactTrainer.training_step

    def spoil(self, model, *args, **kwargs):
        with torch.no_grad():
            next(model.parameters()).fill_(float("inf"))
        return step(self, model, *args, **kwargs).nan_to_num(1.0)

    monkeypatch.setattr(ExactTrainer, "training_step", spoil)
    with pytest.raises(UserError, match="the weights are no longer finite at step 1"):
        run_recipe("pretrain_clm", [*arguments(corpus, tokenizers, tmp_path), "--max_hours", "1e-9"])
    assert not find_checkpoints(str(tmp_path))
    time.sleep(0.5)  # this process goes on with something else, of which a watchdog must not make an end
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
