"""Runs recipes and scripts in forks of a server that has imported everything already.

This saves twelve seconds of imports per run.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED_MODULES = (
    "peft",
    "sentence_transformers",
    "unlabeled.training.embedding",
    "unlabeled.training.classification",
)
_context = multiprocessing.get_context("forkserver")


def start_fork_server(modules: Sequence[str] = ()) -> None:
    """Start the server that all runs are forked from, and wait until it has imported everything.

    Call it before the first run. Every run uses one thread, so that each worker has a core of its own.

    Args:
        modules: more modules that the server imports.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    _context.set_forkserver_preload([*PRELOADED_MODULES, *modules])
    first_fork = _context.Process(target=os.getpid)
    first_fork.start()
    first_fork.join()


def run_recipe(recipe: str, options: dict, log: Path) -> None:
    """Run `python recipes/RECIPE.py --KEY=VALUE ...` and write its output to `log`.

    Raises:
        SystemExit: the recipe failed.
    """
    process = start_recipe(recipe, options, log)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{recipe} failed, see {log}")


def start_recipe(recipe: str, options: dict, log: Path, environment: dict[str, str] | None = None) -> BaseProcess:
    """Start a recipe without waiting for it.

    Args:
        environment: variables that are added to the environment, such as the rank in a distributed run.
    """
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return start_script(f"recipes/{recipe}.py", arguments, log, environment)


def start_script(
    script: str,
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    setup: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start `python SCRIPT ARGUMENTS` in the repository root, with its output in `log`.

    Args:
        setup: called in the new process before the script; must be picklable.
    """
    process = _context.Process(target=_run_script, args=(script, list(arguments), log, environment or {}, setup))
    process.start()
    return process


def _run_script(
    script: str, arguments: list[str], log: Path, environment: dict[str, str], setup: Callable[[], None] | None
) -> None:
    os.environ |= environment
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    if setup:
        setup()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them, but they release locks


def _exit_with_parent() -> None:
    """End this process when the one that started it ends: the fork server, its actual parent, would let it live on."""
    multiprocessing.parent_process().join()
    os._exit(1)
