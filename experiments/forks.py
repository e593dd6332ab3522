"""Recipes run one after another without twelve seconds of imports each: every run is a fork that begins with them."""

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["peft", "sentence_transformers", "unlabeled.training.embedding", "unlabeled.training.classification"]
_FORKS = multiprocessing.get_context("forkserver")


def prepare(modules: Sequence[str] = ()) -> None:
    """One thread for each run, so that there is a core for each worker. It imports, so call it before the first run.

    Args:
        modules: imported as well.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    _FORKS.set_forkserver_preload([*IMPORTED, *modules])
    nothing = _FORKS.Process(target=os.getpid)
    nothing.start()
    nothing.join()


def run_recipe(recipe: str, options: dict, log: Path) -> None:
    """`python recipes/RECIPE.py --KEY=VALUE ...`, what it prints into `log`; `SystemExit` where it fails."""
    process = start_recipe(recipe, options, log)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{recipe} failed, see {log}")


def start_recipe(
    recipe: str, options: dict, log: Path, environment: dict | None = None
) -> multiprocessing.process.BaseProcess:
    """The same, without waiting for it; `environment` may make it one of several processes."""
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return start_script(f"recipes/{recipe}.py", arguments, log, environment)


def start_script(
    script: str,
    arguments: Sequence[str],
    log: Path,
    environment: dict | None = None,
    setup: Callable[[], None] | None = None,
) -> multiprocessing.process.BaseProcess:
    """`python SCRIPT ARGUMENTS` in the root of the repository, what it prints into `log`.

    Args:
        setup: called in the new process before the script; it has to be picklable.
    """
    process = _FORKS.Process(target=_run, args=(script, list(arguments), log, os.getpid(), environment or {}, setup))
    process.start()
    return process


def _run(script: str, arguments: list[str], log: Path, parent: int, environment: dict, setup) -> None:
    os.environ |= environment
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    if setup:
        setup()
    sys.path.insert(0, str(Path(script).resolve().parent))  # as for any script that is run
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out, and they release locks


def _end_with(parent: int) -> None:
    """A fork server survives the process that it serves, and so would a run for hours."""
    while Path(f"/proc/{parent}").exists():
        time.sleep(1)
    os._exit(1)
