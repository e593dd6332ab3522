"""The record, in the folder of a run, of what has been pushed from it and where to."""

from pathlib import Path

from unlabeled.runtime.checkpoints import write_json
from unlabeled.runtime.files import read_optional_json

PUSHED = "pushed.json"  # {repository: {branch: address of the commit}}; it is not pushed itself


def record_push(folder: str | Path, repo_id: str, revision: str | None, commit_url: str) -> None:
    """Record a push that is complete."""
    pushes = _read_record(folder)
    pushes.setdefault(repo_id, {})[revision or "main"] = commit_url
    write_json(Path(folder, PUSHED), pushes)


def pushed_to(folder: str | Path, name: str, revision: str | None = None) -> str | None:
    """The repository to which the folder has been pushed before under this name, or None.

    Args:
        name: as `hub_model_id` has it: NAME/REPO, or REPO alone, which is one of whoever pushes.
    """
    for repo_id, branches in _read_record(folder).items():
        if name in (repo_id, repo_id.split("/")[-1]) and (revision or "main") in branches:
            return repo_id
    return None


def _read_record(folder: str | Path) -> dict[str, dict[str, str]]:
    """The record, empty where there is none or it is damaged: then the push is done again, which changes nothing."""
    pushes = read_optional_json(Path(folder, PUSHED))
    return {repo_id: branches for repo_id, branches in pushes.items() if isinstance(branches, dict)}
