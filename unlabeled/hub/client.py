"""Requests to the Hub: the token, repositories and commits, and the reason of a request that failed."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers

from unlabeled.errors import UserError

T = TypeVar("T")

TOKEN_TIMEOUT_SECONDS = 10.0
RETRY_SECONDS = (1.0, 2.0)  # pauses before the second and the third attempt to reach the Hub


def check_token(token: str | None, remedy: str = "") -> str:
    """Ask the Hub whether a token may write.

    Args:
        token: The token, by default that of `HF_TOKEN` or `hf auth login`.
        remedy: What else would help, for the end of the error message.

    Returns:
        The token to push with.

    Raises:
        UserError: There is no token, the Hub refuses it, it may only read, or the Hub cannot be reached.
    """
    token = token or get_token()
    if not token:
        raise UserError(f"push_to_hub needs a token; set HF_TOKEN or run `hf auth login`{remedy}")

    def request_account():  # HfApi().whoami has no time limit
        headers = build_hf_headers(token=token)
        url = f"{constants.ENDPOINT}/api/whoami-v2"
        return get_session().get(url, headers=headers, timeout=TOKEN_TIMEOUT_SECONDS)

    try:
        response = retry_connection(request_account)
        account = response.json() if response.status_code == 200 else {}
    except Exception as error:  # offline, no route, no certificate, or an answer that is not JSON
        raise UserError(f"push_to_hub: {describe_unreachable(error)}; check the network{remedy}") from error
    if not account:
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} refuses the token (status {response.status_code}); set HF_TOKEN to a "
            f"valid one{remedy}"
        )
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token may only read; set HF_TOKEN to one that may write{remedy}")
    return token


def create_repository(repo_id: str, private: bool, token: str | None) -> str:
    """Create a repository unless it exists. Returns its full name, OWNER/NAME.

    Trainer would do this with an `HfApi` that transformers keeps for the whole process, without another attempt when
    the connection fails.
    """
    create_repo = HfApi().create_repo
    return retry_connection(lambda: create_repo(repo_id, token=token, private=private, exist_ok=True)).repo_id


def check_visibility(repo_id: str, private: bool, token: str | None) -> None:
    """Raise `UserError` if a push that should stay private goes to a public repository."""
    if private and not retry_connection(lambda: HfApi().model_info(repo_id, token=token)).private:
        raise UserError(
            f"{repo_id} is public already; push with --public (hub_private_repo false), or to another repository"
        )


def commit_files(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, str | Path | bytes],
    message: str,
    token: str | None,
    revision: str | None = None,
) -> CommitInfo:
    """Make one commit of several files. Files that the repository holds already are not sent again.

    Args:
        files: Local path or content of each file, by its path in the repository.
        revision: The branch, by default the main one.
    """
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def retry_connection(request: Callable[[], T]) -> T:
    """Return `request()`, which is called again after a short pause if the Hub cannot be reached.

    An answer with an error status is not repeated.
    """
    for seconds in RETRY_SECONDS:
        try:
            return request()
        except HTTPError as error:
            if _status(error) is not None:
                raise
            time.sleep(seconds)
    return request()


@contextmanager
def user_error_on_failed_push(failure: str, repo_id: str, remedy: str) -> Iterator[None]:
    """Turn errors of the Hub, the network and the disk into a `UserError`: "FAILURE: reason; REMEDY"."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{failure}: {describe_push_failure(error, repo_id)}; {remedy}") from error


def describe_push_failure(error: BaseException, repo_id: str) -> str:
    """Describe why a push failed, in a part of a sentence."""
    while error.__cause__ and not isinstance(error, HTTPError):  # an upload wraps the error that stopped it
        error = error.__cause__
    status = _status(error)
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no {repo_id}, or the token may not see it"
    if status in (401, 403):
        return f"the token may not write to {repo_id} (status {status})"
    if status:
        return f"the Hub answers with status {status}"
    if isinstance(error, HTTPError | ConnectionError):
        return describe_unreachable(error)
    return first_line(error)


def describe_unreachable(error: BaseException) -> str:
    """Say that the Hub cannot be reached, with the kind of the error and the reason of the operating system."""
    name = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{constants.ENDPOINT} cannot be reached ({name}: {cause.strerror.lower()})"
        cause = cause.__cause__ or cause.__context__
    return f"{constants.ENDPOINT} cannot be reached ({name})"


def first_line(error: BaseException) -> str:
    """The first line of an error message, without its full stop; the name of the error where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _status(error: BaseException) -> int | None:
    """The status of the response that an error is about, or None where no response arrived."""
    return getattr(getattr(error, "response", None), "status_code", None)
