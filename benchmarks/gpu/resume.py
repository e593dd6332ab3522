"""Runs that are stopped and resumed, with deterministic kernels: do they end in the weights of uninterrupted runs?"""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import GenerationMixin, TrainerCallback

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.inputs import make_inputs
from benchmarks.gpu.recipes import RECIPES, ROOT, make_arguments

STEPS = 20
STOP_STEP = 10
STOPPED_STATUS = 75


def resume(bench: Bench, folder: Path, small: bool) -> None:
    """Compare an uninterrupted run with one that is stopped and resumed, for a causal and a masked model."""
    make_inputs(folder, small)
    shutil.rmtree(folder / "resume", ignore_errors=True)
    for name in ("gpt2-124m", "modernbert-base"):
        uninterrupted = folder / "resume" / f"{name}-uninterrupted"
        stopped = folder / "resume" / f"{name}-stopped"
        repeated = folder / "resume" / f"{name}-repeated"
        run(name, folder, uninterrupted, None, bench.on_gpu)
        run(name, folder, stopped, STOP_STEP, bench.on_gpu)
        run(name, folder, stopped, None, bench.on_gpu)
        is_equal, difference = compare_weights(uninterrupted, stopped)
        values = {"equal_bit_for_bit": is_equal, "largest_difference": difference}
        if not is_equal:  # because of the interruption, or would any second run differ?
            run(name, folder, repeated, None, bench.on_gpu)
            _, values["largest_difference_of_two_uninterrupted_runs"] = compare_weights(uninterrupted, repeated)
        bench.record(f"{name}, small: uninterrupted, and stopped after {STOP_STEP} of {STEPS} steps", **values)


def compare_weights(folder: Path, other: Path) -> tuple[bool, float]:
    """Whether the weights of two runs are equal bit for bit, and their largest difference."""
    weights = load_file(folder / "model.safetensors")
    other_weights = load_file(other / "model.safetensors")
    is_equal = all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    differences = [float((weights[name].double() - other_weights[name].double()).abs().max()) for name in weights]
    return is_equal, max(differences)


def run(name: str, folder: Path, output_dir: Path, stop_step: int | None, on_gpu: bool) -> None:
    """Run a small recipe in a process of its own, up to `stop_step` or to its end."""
    arguments = (name, folder, output_dir, stop_step, on_gpu)
    child = multiprocessing.get_context("fork").Process(target=run_recipe, args=arguments)
    child.start()
    child.join()
    expected_status = 0 if stop_step is None else STOPPED_STATUS
    if child.exitcode != expected_status:
        raise RuntimeError(f"{output_dir.name} ended with status {child.exitcode}, see the log")


def run_recipe(name: str, folder: Path, output_dir: Path, stop_step: int | None, on_gpu: bool) -> None:
    """The process of a run. At `stop_step` it receives the signal that Slurm sends."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)

    class StopCallback(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if stop_step is not None and state.global_step == stop_step - 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    transformers.trainer.DEFAULT_CALLBACKS.append(StopCallback)
    GenerationMixin.generate = lambda self, ids, **options: ids  # samples would take longer than the rest of the run
    script = str(ROOT / "recipes" / f"{RECIPES[name].script}.py")
    sys.argv = [script, *make_arguments(name, folder, output_dir, True, STEPS, on_gpu, compile="false")]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status or 0)
