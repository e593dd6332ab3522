"""The push of a finished folder: checked, sent as one commit, loaded back from the Hub and compared."""

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitInfo, HfApi, constants, get_token

from unlabeled.data.tokenization import load_tokenizer
from unlabeled.errors import UserError
from unlabeled.hub.client import (
    check_token,
    check_visibility,
    commit_files,
    create_repository,
    first_line,
    user_error_on_failed_push,
)
from unlabeled.hub.contents import check_links, check_secrets, find_push_contents
from unlabeled.hub.preconditions import check_finished
from unlabeled.hub.push_record import record_push
from unlabeled.models.adapter_files import adapter_base
from unlabeled.models.configs import load_config
from unlabeled.models.exports import load_and_check_export

PROBE_TEXT = "In the beginning there was text, and the text labeled itself."


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    create: bool = True,
    message: str = "Push a trained model",
    revision: str | None = None,
    include: Sequence[str] = (),
) -> str | None:
    """Push a finished folder to the Hub in one commit and load it back from there.

    Before the first file is sent, the folder is listed, searched for secrets and loaded. If a push fails, the same call
    continues it: large files that have arrived stay on the Hub and are not sent again. A complete push is recorded in
    the folder (see `push_record`).

    Args:
        folder: The `output_dir` of a finished run, a model or an adapter.
        repo_id: The repository, as NAME or OWNER/NAME.
        private: Whether a repository that is created is private. If true, a public repository is refused.
        token: A token that may write, by default that of `HF_TOKEN` or `hf auth login`.
        dry_run: Stop before the first request.
        create: Create the repository if it does not exist.
        message: The message of the commit.
        revision: An existing branch, by default the main one.
        include: Paths in the folder of files to push although no run writes them.

    Returns:
        The address of the commit, or None for a dry run.

    Raises:
        UserError: The folder is unfinished, holds a secret or does not load, or the Hub refuses the push.
    """
    folder = Path(folder)
    check_finished(folder)
    sizes, excluded = find_push_contents(folder, include)
    _print_contents(sizes, excluded, repo_id, private)
    check_links(folder, excluded)
    check_secrets(folder, sizes, token or get_token())
    command = push_command(folder, repo_id, private, revision, include)
    remedy = f"nothing is lost, push again with: {command}"
    if not dry_run:
        token = check_token(token, f"; {remedy}")
    expected_logits = compute_probe_logits(folder)
    if dry_run:
        print("dry run: nothing was sent")
        return None
    with user_error_on_failed_push(f"{folder} was not pushed to {repo_id}", repo_id, remedy):
        if create:
            repo_id = create_repository(repo_id, private, token)
        check_visibility(repo_id, private, token)
        files = _prepare_files(folder, sizes, repo_id)
        commit = commit_files(HfApi(), repo_id, files, message, token, revision)
    with user_error_on_failed_push(
        f"{folder} was pushed to {repo_id} but does not come back from there", repo_id, remedy
    ):
        _check_pushed_logits(repo_id, commit, token, expected_logits)
    with suppress(OSError):  # a read-only folder; without a record, a run pushes again, which is harmless
        record_push(folder, repo_id, revision, commit.commit_url)
    print(f"pushed to {commit.commit_url}; loaded from there, its logits are equal")
    return commit.commit_url


def push_command(folder: Path, repo_id: str, private: bool, revision: str | None, include: Sequence[str]) -> str:
    """The shell command that repeats a push."""
    words = ["python", "scripts/push_to_hub.py", str(folder), "--repo-id", repo_id]
    if not private:
        words.append("--public")
    if revision:
        words += ["--revision", revision]
    for path in include:
        words += ["--include", path]
    return shlex.join(words)


def compute_probe_logits(folder: str | Path) -> torch.Tensor:
    """Load the model of a folder and compute its logits for a fixed text.

    Returns:
        A tensor of shape (1, tokens, vocabulary) on the CPU; for a classifier, that of its head.

    Raises:
        UserError: The model does not load, or weights are missing or left over.
    """
    try:
        tokenizer = load_tokenizer(str(folder), str(folder))
        architecture = load_config(adapter_base(str(folder)) or str(folder)).architectures[0]
        model = load_and_check_export(getattr(transformers, architecture), str(folder))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} does not load ({first_line(error)}); train or export it again") from error
    input_ids = tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"]
    inputs = {"input_ids": input_ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids
    with torch.no_grad():
        return model(**inputs)[0]


def _print_contents(sizes: Mapping[str, int], excluded: Mapping[str, str], repo_id: str, private: bool) -> None:
    for path, size in sizes.items():
        print(f"  {size:>14,}  {path}")
    visibility = "private" if private else "public"
    print(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files for {repo_id}, {visibility}")
    for path, reason in excluded.items():
        print(f"  {'stays here':>14}  {path} ({reason})")


def _prepare_files(folder: Path, paths: Mapping[str, int], repo_id: str) -> dict[str, Path | bytes]:
    """The files of the commit. The usage example of the model card loads the repository instead of the folder."""
    files: dict[str, Path | bytes] = {path: folder / path for path in paths}
    if "README.md" in files:
        card = (folder / "README.md").read_text(encoding="utf-8")
        files["README.md"] = card.replace(f'"{folder.resolve().name}"', f'"{repo_id}"').encode()
    return files


def _check_pushed_logits(repo_id: str, commit: CommitInfo, token: str | None, expected_logits: torch.Tensor) -> None:
    """Raise `ValueError` unless the model, downloaded from the Hub, computes the expected logits."""
    # A fresh folder on the disk of the downloads: a cached copy would not show what is on the Hub.
    os.makedirs(constants.HF_HOME, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="push-", dir=constants.HF_HOME) as cache:
        copy = HfApi().snapshot_download(repo_id, revision=commit.oid, token=token, cache_dir=cache)
        if not compute_probe_logits(copy).equal(expected_logits):
            raise ValueError("the logits are others than those of the folder")
