"""The record of complete pushes, in the folder of the run."""

from pathlib import Path

from unlabeled.runtime.files import read_optional_json, write_json

PUSHED = "pushed.json"  # {repository: {branch: address of the commit}}; it is not pushed itself


def record_push(folder: str | Path, repo_id: str, revision: str | None, commit_url: str) -> None:
    """Record a complete push."""
    pushes = _read_record(folder)
    pushes.setdefault(repo_id, {})[revision or "main"] = commit_url
    write_json(Path(folder, PUSHED), pushes)


def pushed_to(folder: str | Path, name: str, revision: str | None = None) -> str | None:
    """The repository to which the folder was pushed under a name, or None.

    Args:
        folder: The folder of the run.
        name: As in `hub_model_id`: OWNER/NAME, or NAME alone for a repository of the user.
        revision: The branch, by default the main one.
    """
    for repo_id, branches in _read_record(folder).items():
        if name in (repo_id, repo_id.split("/")[-1]) and (revision or "main") in branches:
            return repo_id
    return None


def _read_record(folder: str | Path) -> dict[str, dict[str, str]]:
    """The record; empty if there is none or it is damaged, as pushing again is harmless."""
    pushes = read_optional_json(Path(folder, PUSHED))
    return {repo_id: branches for repo_id, branches in pushes.items() if isinstance(branches, dict)}
