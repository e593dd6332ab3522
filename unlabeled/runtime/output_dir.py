"""An `output_dir` belongs to one run: acquired by its first process, refused to every other run."""

import shutil
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.runtime.checkpoints import find_checkpoints
from unlabeled.runtime.files import read_json, write_json
from unlabeled.runtime.run_comparison import describe_difference
from unlabeled.runtime.run_lock import hold_output_dir

RUN = "run.json"  # the identity of the run in the folder
# In a folder without `RUN`, such files are those of another program.
RUN_ARTIFACTS = ("*.safetensors", "*.bin", "*.json", "README.md")


def make_output_dir(output_dir: str) -> None:
    """Create the folder of a run where there is none.

    Raises:
        UserError: it cannot be created.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def _unwritable(output_dir: str, error: OSError) -> UserError:
    return UserError(f"cannot write to output_dir {output_dir} ({error.strerror}); set it to another folder")


def acquire_output_dir(output_dir: str, identity: dict, needed_bytes: int = 0, is_first: bool = True) -> bool:
    """Reserve `output_dir` for this run until the process ends.

    Args:
        output_dir: The folder, which is created if necessary.
        identity: Everything that must not change when the run is resumed.
        needed_bytes: Size of the checkpoints of the run, including those that exist.
        is_first: Whether this is the first process of the run, which locks the folder for all of them.

    Returns:
        Whether the run in the folder has finished already.

    Raises:
        UserError: The folder belongs to another run, another process trains in it, it cannot be written to, or its disk
            is too full.
    """
    folder = Path(output_dir)
    record = folder / RUN
    try:
        if _is_finished(folder, identity):
            return True
        folder.mkdir(parents=True, exist_ok=True)
        if is_first:
            hold_output_dir(output_dir)
            if _is_finished(folder, identity):  # by another process, for which this one has waited
                return True
        _check_disk_space(output_dir, needed_bytes)
        if not record.exists():  # every process comes here, the first one first
            write_json(record, identity)
    except OSError as error:
        raise _unwritable(output_dir, error) from error
    return False


def _check_disk_space(output_dir: str, needed_bytes: int) -> None:
    checkpoints = find_checkpoints(output_dir)
    existing_bytes = sum(file.stat().st_size for path in checkpoints for file in Path(path).rglob("*"))
    missing_bytes = needed_bytes - existing_bytes
    free_bytes = shutil.disk_usage(output_dir).free
    if free_bytes < missing_bytes:
        raise UserError(
            f"the disk of output_dir {output_dir} has {free_bytes / 1e6:,.1f} MB free and the checkpoints need "
            f"{missing_bytes / 1e6:,.1f} MB; free some space, or lower save_total_limit"
        )


def _is_finished(folder: Path, identity: dict) -> bool:
    """Whether the run in a folder is finished.

    Raises:
        UserError: The folder holds another run, or files of another program.
    """
    if not (folder / RUN).exists():
        artifacts = [str(path) for pattern in RUN_ARTIFACTS for path in folder.glob(pattern)]
        foreign = find_checkpoints(str(folder)) + artifacts
        if foreign:
            raise UserError(f"{foreign[0]} was not written by this run; set output_dir to another folder")
        return False
    difference = describe_difference(str(folder), _read_run(folder / RUN), identity)
    if difference:
        raise UserError(difference)
    return (folder / "metrics.json").exists()


def _read_run(path: Path) -> dict:
    try:
        run = read_json(path)
    except ValueError:
        run = None
    if not isinstance(run, dict):
        raise UserError(f"{path} is damaged, so what this run was is not known; set output_dir to another folder")
    return run
