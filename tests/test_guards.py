"""Runs that are stopped, break down or hang leave a complete checkpoint and one sentence, and resume exactly."""

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
from transformers import Trainer, TrainerState

from unlabeled import Stopped, UserError, errors
from unlabeled.data.rows import TrainingRows
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.runtime.checkpoints import find_checkpoints, find_newest_checkpoint
from unlabeled.runtime.staging import folder_lock
from unlabeled.training import memory_errors, watchdog
from unlabeled.training.memory_errors import device_memory, user_error_on_out_of_memory
from unlabeled.training.preemption import Preemption
from unlabeled.training.spikes import SKIPS, count_skipped, is_finite_step
from unlabeled.training.watchdog import Watchdog

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS = 60


def arguments(corpus, tokenizers, folder, **options) -> list[str]:
    """The command line of a run of 60 steps."""
    options = {"train_tokens": STEPS * 256, "save_strategy": "no"} | options
    return recipe_arguments("clm", "llama", corpus, tokenizers, folder, **options)


def start(arguments: list[str], processes: int = 1, environment: dict | None = None) -> subprocess.Popen:
    """Start the causal recipe, in a process group of its own. Its output can be read line by line."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "recipes" / "pretrain_clm.py"), *arguments]
    environment = ENVIRONMENT | (environment or {})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Wait until a run reports a step."""
    for line in process.stdout:
        if line.startswith("step") and int(line[4:].split("/")[0].replace(",", "")) >= step:
            return
    raise AssertionError(process.stderr.read()[-3000:])


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0), (signal.SIGINT, 2)])
def test_signal_saves_and_resumes(signal_number, workers, corpus, tokenizers, tmp_path):
    """The signal reaches the whole process group, as from Ctrl-C or Slurm, so the data-loader workers too."""
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path / "whole"))
    words = arguments(corpus, tokenizers, tmp_path / "stopped", dataloader_num_workers=workers)
    process = start(words)
    wait_for_step(process, 5)
    os.killpg(process.pid, signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Stopped.STATUS
    step = int(Path(find_newest_checkpoint(str(tmp_path / "stopped"))).name.removeprefix("checkpoint-"))
    assert f"stopped: {signal_number.name} ended the run after step {step} of {STEPS}; it is saved" in errors
    assert "Traceback" not in errors
    run_recipe("pretrain_clm", words)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_signal_to_one_of_two_processes(corpus, tokenizers, tmp_path):
    """Both processes stop at the same step. torchrun ends with a status of its own."""
    words = arguments(corpus, tokenizers, tmp_path / "stopped", per_device_train_batch_size=4)
    process = start(words, processes=2)
    wait_for_step(process, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGUSR1 ended the run after step" in errors
    saved = find_newest_checkpoint(str(tmp_path / "stopped"))
    process = start(words, processes=2)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors[-3000:]
    assert f"resuming from {saved}" in output
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path / "whole"))
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_max_hours(corpus, tokenizers, tmp_path):
    words = arguments(corpus, tokenizers, tmp_path, train_tokens=4 * 256)
    with pytest.raises(Stopped, match="max_hours ended the run after step 1 of 4"):
        run_recipe("pretrain_clm", [*words, "--max_hours", "1e-9"])
    assert [Path(path).name for path in find_checkpoints(str(tmp_path))] == ["checkpoint-1"]
    run_recipe("pretrain_clm", words)
    assert (tmp_path / "metrics.json").exists()


def test_repeated_signals_and_restored_handlers(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption(None)
    killed = []
    preemption.on_train_begin(None, None, None)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    handler = signal.getsignal(signal.SIGTERM)
    handler(signal.SIGTERM, None)
    handler(signal.SIGTERM, None)  # a repeat within 5 s is the launcher's echo of the same signal
    assert not killed
    assert preemption.noticed == signal.SIGTERM
    preemption.since -= 6
    handler(signal.SIGTERM, None)
    assert killed == [signal.SIGTERM]
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=7)
    preemption.on_train_end(args, state, None)
    assert signal.getsignal(signal.SIGTERM) != before, "the last step is in no checkpoint"
    (tmp_path / "checkpoint-7").mkdir()
    preemption.on_train_end(args, state, None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_usable_gradient_norms(capsys, tmp_path):
    args = SimpleNamespace(grad_norm_skip_ratio=10.0, output_dir=str(tmp_path))
    state = TrainerState(log_history=[{"grad_norm": norm} for norm in (1.0, 2.0, 3.0, 2.0)], global_step=6)
    assert is_finite_step(1e6, args, state), "four norms are too few for a median"
    assert not is_finite_step(float("nan"), args, state) and not is_finite_step(float("inf"), args, state)
    state.log_history += [{"grad_norm": float("inf")}, {"grad_norm": 2.0}]
    assert is_finite_step(20.0, args, state) and not is_finite_step(20.1, args, state)
    args.grad_norm_skip_ratio = 0
    assert is_finite_step(1e9, args, state) and not is_finite_step(float("inf"), args, state)
    for number in range(1, SKIPS + 1):
        assert count_skipped(20.1, args, state) == number
        assert "step      7 skipped: the norm of its gradients is 20.1" in capsys.readouterr().out
        state.log_history.append({"skipped_steps": number, "step": 6})
    with pytest.raises(
        UserError, match=r"11 of the last 1000 steps were not usable.*; the last good checkpoint is none"
    ):
        count_skipped(20.1, args, state)
    state.global_step += 2000
    assert count_skipped(20.1, args, state) == 11, "the others are more than 1000 steps ago"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_skipped_step(optimizer, logging_steps, corpus, tokenizers, tmp_path, monkeypatch):
    """A skipped step changes neither weights nor optimizer states, and its loss, NaN here, is in no metric."""
    original_call = ChunkedLinearCrossEntropy.__call__
    losses_of_steps = []
    states = {}

    def loss(self, outputs, labels, num_items_in_batch=1):
        nats = original_call(self, outputs, labels, num_items_in_batch)
        if num_items_in_batch != 1:  # not in evaluation
            losses_of_steps.append(nats.item())
            nats = nats * (float("nan") if len(losses_of_steps) == 2 else 1.0)
        return nats

    def record_states(self, args, state, control, model=None, optimizer=None, **kwargs):
        moments = [value.clone() for group in optimizer.state.values() for value in group.values()]
        states[state.global_step] = [parameter.detach().clone() for parameter in model.parameters()] + moments

    monkeypatch.setattr(ChunkedLinearCrossEntropy, "__call__", loss)
    monkeypatch.setattr(Watchdog, "on_step_end", record_states)
    monkeypatch.setattr(Watchdog, "on_train_begin", lambda *args, **kwargs: None)
    options = {"train_tokens": 3 * 256, "optimizer": optimizer, "logging_steps": logging_steps}
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path, **options))
    assert all(map(torch.equal, states[1], states[2]))
    assert not all(map(torch.equal, states[2], states[3]))
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped_steps"] == 1
    losses = [entry["loss"] for entry in json.loads((tmp_path / "history.json").read_text()) if "loss" in entry]
    expected = [losses_of_steps[0], losses_of_steps[2]]
    if logging_steps == 3:
        expected = [sum(expected) / 2]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_out_of_memory(monkeypatch):
    """The message names a micro-batch that fits by the plan, with 10 % to spare."""
    monkeypatch.setattr(memory_errors, "device_memory", lambda device: 10 * 10**9)
    args = SimpleNamespace(per_device_train_batch_size=8, device=torch.device("cpu"))
    plan = {1: 3 * 10**9, 2: 5 * 10**9, 4: 9 * 10**9 + 1, 8: 17 * 10**9}
    sentence = r"per_device_train_batch_size from 8 to 2, which takes about 5\.0 of 10\.0 GB"
    with pytest.raises(UserError, match=sentence), user_error_on_out_of_memory(args, plan):
        torch.empty(2**60)
    args.per_device_train_batch_size = 1
    with pytest.raises(UserError, match="shorten max_length"), user_error_on_out_of_memory(args, plan):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="something else"), user_error_on_out_of_memory(args, plan):
        raise RuntimeError("something else")
    assert 10**9 < device_memory(torch.device("cpu")) < 10**15


@pytest.mark.slow
def test_lost_process_ends_the_others(corpus, tokenizers, tmp_path):
    """Without a launcher that would end them: the remaining process says that it has lost another one."""
    words = arguments(corpus, tokenizers, tmp_path, per_device_train_batch_size=4)
    (port,) = free_ports(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (
        start(words, environment=address | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}) for rank in "01"
    )
    wait_for_step(first, 5)
    second.kill()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == Stopped.STATUS
    assert "stopped: process 0 has lost another one" in errors
    assert "the same command continues" in errors
    second.communicate()


def test_weights_are_checked_before_the_last_save(corpus, tokenizers, tmp_path, monkeypatch):
    """When the time is up, weights that are no longer finite are not saved."""
    from unlabeled.training import ExactTrainer

    training_step = ExactTrainer.training_step

    def make_weights_infinite(self, model, *args, **kwargs):
        with torch.no_grad():
            next(model.parameters()).fill_(float("inf"))
        return training_step(self, model, *args, **kwargs).nan_to_num(1.0)

    monkeypatch.setattr(ExactTrainer, "training_step", make_weights_infinite)
    with pytest.raises(UserError, match="the weights are no longer finite at step 1"):
        run_recipe("pretrain_clm", [*arguments(corpus, tokenizers, tmp_path), "--max_hours", "1e-9"])
    assert not find_checkpoints(str(tmp_path))
    time.sleep(0.5)  # a watchdog that is left behind would end this process
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


# --- Errors that are worth a retry -----------------------------------------------------------------------------------

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, "
RETRIED = (
    GLOO + "Connection closed by peer [10.2.96.68]:21932",
    GLOO + "Read error [192.168.70.92]:25266: Connection reset by peer",
    GLOO + "Write error [192.168.70.92]:25266: Broken pipe",
    GLOO + "Application timeout caused pair closure",
    "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
    "Timed out waiting 1800000ms for send operation to complete",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    NCCL + "remote process exited or there was a network error, NCCL version 2.28.9\nncclRemoteError: A call failed "
    "possibly due to a network error or a remote process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to "
    "recv from 172.16.0.2<33759> failed : Connection reset by peer",
    NCCL + "internal error, NCCL version 2.20.5\nncclInternalError: Internal check failed.\nLast error:\nNet : "
    "Connection closed by remote peer node7<50260>",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=77, OpType=ALLREDUCE, NumelIn=1, "
    "Timeout(ms)=1800000) ran for 1800090 milliseconds before timing out.",
    "NCCL communicator was aborted on rank 1.",
)
NOT_RETRIED = (
    NCCL + "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\nncclInvalidUsage: This usually "
    "reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA "
    "device 1000",
    NCCL + "invalid argument (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\nncclInvalidArgument: Invalid "
    "value for an argument.",
    NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: "
    "Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    NCCL
    + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclSystemError: System "
    "call (e.g. socket, malloc) or external library call failed or device error.",
    "NCCL communicator was aborted on rank 1. Original reason for failure was: " + NCCL + "invalid usage",
    "Distributed package doesn't have NCCL built in",
    "ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
    "No backend type associated with device type cpu; NCCL has cuda only",
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: invalid device ordinal",
    "DataLoader timed out after 120 seconds",
    "The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension 0",
)


@pytest.mark.parametrize(
    ("message", "retried"), [(text, True) for text in RETRIED] + [(text, False) for text in NOT_RETRIED]
)
def test_retried_errors(message, retried, monkeypatch, capsys):
    """A lost peer ends the process with status 75, for a retry; any other error is raised unchanged."""
    monkeypatch.setattr(errors, "_process_group", lambda: SimpleNamespace(get_rank=lambda: 3))
    error = RuntimeError(message)
    with pytest.raises(SystemExit if retried else RuntimeError) as raised, errors.exit_on_user_error():
        raise error
    if retried:
        assert raised.value.code == Stopped.STATUS
    else:
        assert raised.value is error
    assert ("process 3 has lost another one" in capsys.readouterr().err) == retried


def test_error_messages_of_installed_torch():
    """If torch changes the wording, the patterns for lost peers have to change with it."""
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")).read_bytes()
    for text in (
        b"Connection closed by peer ",
        b"Timed out waiting ",
        b"Connection was likely closed. Did the remote",
        b"Application timeout caused pair closure",
        b"wait timeout after ",
    ):
        assert text in library, text


# --- The watchdog -------------------------------------------------------------------------------------------------


def test_watchdog_allows_slow_work(corpus, tokenizers, tmp_path, monkeypatch):
    """Reading, evaluation and saving each take longer than the limit of 1.25 s, but every part of them is quick."""
    exits = []
    delay = 0.3
    seconds = {"reading": 0.0, "evaluation": 0.0, "saving": 0.0}
    monkeypatch.setattr(watchdog.os, "_exit", exits.append)
    original_read = TrainingRows.read
    original_save = Trainer._save_optimizer_and_scheduler
    original_begin = Watchdog.on_train_begin

    def slow_down(phase: str) -> None:
        time.sleep(delay)
        seconds[phase] += delay

    def read(self, indices):
        slow_down("reading")
        return original_read(self, indices)

    def save(self, output_dir):
        for number in range(6):
            Path(output_dir, f"part-{number}").write_bytes(b"weights")
            slow_down("saving")
        return original_save(self, output_dir)

    def forward(model, *args):
        if not model.training and threading.current_thread() is threading.main_thread() and Watchdog.is_on:
            slow_down("evaluation")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        Watchdog.is_on = True
        model.register_forward_pre_hook(forward)
        return original_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watchdog, "is_on", False, raising=False)
    monkeypatch.setattr(Watchdog, "on_train_begin", on_train_begin)
    monkeypatch.setattr(TrainingRows, "read", read)
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    eval_data = tmp_path / "few.jsonl"
    eval_data.write_text("".join(Path(corpus["validation"]).read_text().splitlines(keepends=True)[:3]))
    options = {"train_tokens": 256, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2}
    options |= {"ddp_timeout": 1, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run_recipe("pretrain_clm", arguments(corpus, tokenizers, tmp_path / "run", eval_data=eval_data, **options))
    assert min(seconds.values()) > 1.25, seconds
    assert not exits


def test_watchdog_ends_a_stalled_run():
    """Also while it watches a model and a folder in which nothing happens."""
    code = """
import sys, time
from types import SimpleNamespace
import torch
from transformers import TrainerState
from unlabeled.training.watchdog import Watchdog
watchdog = Watchdog()
model = torch.nn.Linear(1, 1)
watchdog.on_train_begin(SimpleNamespace(ddp_timeout=1), TrainerState(global_step=7), None)
with watchdog.watching(model), watchdog.watching_files(sys.argv[1]), watchdog.paused():
    time.sleep(3)
def stalled_data_loader():
    time.sleep(60)
with watchdog.watching(model), watchdog.watching_files(sys.argv[1]):
    for _ in range(4):
        model(torch.ones(1))
        time.sleep(0.5)
    print("went on", flush=True)
    stalled_data_loader()
"""
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "docs")], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == Stopped.STATUS
    assert time.monotonic() - started < 50
    assert "went on" in result.stdout
    assert "no progress for 1 s (ddp_timeout) after step 7" in result.stderr
    assert "stalled_data_loader" in result.stderr


WAITING = """
import os, sys
from unlabeled import UserError, exit_on_user_error
from unlabeled.config import PretrainingArguments
from unlabeled.runtime.staging import staged_folder
args = PretrainingArguments(
    sys.argv[1], use_cpu=True, ddp_timeout=2, train_tokens=64, batch_tokens=64, max_length=8,
    per_device_train_batch_size=4,
)
with args.main_process_first() as is_first:
    assert is_first == (args.process_index == 0)
    with staged_folder(sys.argv[2]) as staged:  # the first process waits three times as long as a collective may
        assert (staged is not None) == is_first
print(f"process {args.process_index} went on", flush=True)
try:
    with args.main_process_first():
        assert args.process_index == 0, "the others do not repeat what has failed"
        raise UserError("the text is bad; mend it")
except UserError as error:
    print(f"process {args.process_index} failed: {error}", flush=True)
with exit_on_user_error():  # leaves as a recipe does: threads of gloo may abort while Python is finalized
    pass
"""


def test_slow_main_process_first(tmp_path):
    """The others wait for the first process, which waits for another run itself, and fail with it."""
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [*launcher, str(script), str(tmp_path), str(tmp_path / "data")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with folder_lock(tmp_path / "data"):
        process = subprocess.Popen(command, **pipes, text=True, env=environment)
        assert "waiting for another process that writes" in process.stdout.readline()
        time.sleep(6)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    for number in (0, 1):
        assert f"process {number} went on" in output
        assert f"process {number} failed: the text is bad; mend it" in output
