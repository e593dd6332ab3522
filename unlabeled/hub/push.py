"""The Hub: a push that is checked before and after, and pushes while training."""

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers
from transformers.trainer_utils import HubStrategy

from unlabeled.data.tokenization import load_tokenizer
from unlabeled.errors import UserError
from unlabeled.hub.contents import check_links, check_secrets, contents, files_of_checkpoint, pickles_among
from unlabeled.hub.push_record import pushed_to, record_push
from unlabeled.models.loading import adapter_base, load_config, reload
from unlabeled.runtime.files import check_model_folder, read_json_object
from unlabeled.runtime.run_lock import hold_output_dir

PROBE = "In the beginning there was text, and the text labelled itself."


def check_token(token: str | None, otherwise: str = "") -> str:
    """The token to push with, after asking the Hub whether it knows it.

    Args:
        otherwise: what else than another token would help, for the end of the sentence.

    Raises:
        UserError: there is no token, it is refused or may only read, or no Hub answers.
    """
    if not (token := token or get_token()):
        raise UserError(f"push_to_hub needs a token; set HF_TOKEN or run `hf auth login`{otherwise}")
    try:  # not HfApi().whoami, which waits for ever
        headers = build_hf_headers(token=token)
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=10)
        who = answer.json() if answer.status_code == 200 else {}
    except Exception as error:  # offline, no route, no certificate, no JSON
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the "
            f"network{otherwise}"
        ) from error
    if not who:
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} refuses the token (status {answer.status_code}); set HF_TOKEN to a "
            f"valid one{otherwise}"
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token may only read; set HF_TOKEN to one that may write{otherwise}")
    return token


def check_push(args) -> None:
    """Before training: would the Hub take what `push_to_hub` will push? Raises `UserError` as `check_token` does."""
    if args.push_to_hub and not args.process_index:
        check_token(args.hub_token, ", or set push_to_hub to false")


def check_push_of_own_base(args) -> None:
    """Before training: raise `UserError` if an adapter would be pushed whose base model lies inside its own folder."""
    if args.push_to_hub:
        raise UserError(
            "push_to_hub: the base model of this adapter has a new head or new tokens, so it is saved in the folder of "
            "the adapter, where nobody else has it; set adapter: none, or push_to_hub: false"
        )


# --- A push: looked at, sent as one commit, loaded back from the Hub --------------------------------------------------


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
    """Push a finished folder to the Hub in one commit and load it back from there. Returns the address of the commit.

    Nothing is sent before the folder has been listed, searched for secrets and loaded. After a failure the same call
    goes on where it stopped: the Hub keeps the large files that have arrived, and the client asks which. A push that is
    complete is recorded in the folder, see `pushes`.

    Args:
        private: of a repository that is created; one that is public already is refused.
        dry_run: stop before the first request.
        create: make the repository if it is not there.
        revision: the branch, which has to be there; the main one by default.
        include: files of the folder that go although no run writes them.

    Raises:
        UserError: the folder is unfinished, holds a secret or does not load; or the Hub refuses, and why.
    """
    check_finished(folder := Path(folder))
    going, staying = contents(folder, include)
    for path, size in going.items():
        print(f"  {size:>14,}  {path}")
    whose = "private" if private else "public"
    print(f"  {sum(going.values()):>14,}  bytes in {len(going)} files for {repo_id}, {whose}")
    for path, reason in staying.items():
        print(f"  {'stays here':>14}  {path} ({reason})")
    check_links(folder, staying)
    check_secrets(folder, going, token or get_token())
    again = f"nothing is lost, push again with: {command_again(folder, repo_id, private, revision, include)}"
    token, api = None if dry_run else check_token(token, f"; {again}"), HfApi()
    expected = logits(str(folder))
    if dry_run:
        return print("dry run: nothing was sent")
    with user_error_on_failed_push(f"{folder} was not pushed to {repo_id}", repo_id, again):
        if create:
            repo_id = api.create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        check_visibility(api, repo_id, private, token)
        files = {path: folder / path for path in going}
        if "README.md" in files:  # the usage names what is loaded: from now on that is the repository
            card = files["README.md"].read_text(encoding="utf-8")
            files["README.md"] = card.replace(f'"{folder.resolve().name}"', f'"{repo_id}"').encode()
        commit = upload(api, repo_id, files, message, token, revision)
    with user_error_on_failed_push(
        f"{folder} was pushed to {repo_id} but does not come back from there", repo_id, again
    ):
        # Where downloads belong there is room for one. It is fresh: a cache would hide what is on the Hub.
        os.makedirs(constants.HF_HOME, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="push-", dir=constants.HF_HOME) as fresh:
            copy = api.snapshot_download(repo_id, revision=commit.oid, token=token, cache_dir=fresh)
            if not logits(copy).equal(expected):
                raise ValueError("the logits are others than those of the folder")
    with suppress(OSError):  # of a folder that can only be read; without a record a run pushes again, which is harmless
        record_push(folder, repo_id, revision, commit.commit_url)
    print(f"pushed to {commit.commit_url}; loaded from there, its logits are equal")
    return commit.commit_url


def command_again(folder: Path, repo_id: str, private: bool, revision: str | None, include: Sequence[str]) -> str:
    """The command that repeats a push."""
    words = ["python", "scripts/push_to_hub.py", str(folder), "--repo-id", repo_id]
    words += [] if private else ["--public"]
    words += ["--revision", revision] if revision else []
    for path in include:
        words += ["--include", path]
    return shlex.join(words)


def check_finished(folder: Path) -> None:
    """Raise `UserError` unless it is the folder of a finished model, which others can load."""
    adapter = folder / "adapter_config.json"
    if not (folder / "config.json").is_file() and not adapter.is_file():
        raise UserError(f"{folder} holds no model; name the output_dir of a finished run")
    if (folder / "run.json").exists() and not (folder / "metrics.json").exists():
        raise UserError(f"{folder} holds an unfinished run; run its command again to finish it")
    check_model_folder(folder)
    if adapter.is_file():
        check_base(str(read_json_object(adapter, "train or export it again").get("base_model_name_or_path") or ""))


def check_base(base: str) -> None:
    """Raise `UserError` if the base model of an adapter is a folder, here or elsewhere, which nobody else has."""
    if os.path.exists(base) or base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(
            f"an adapter cannot be pushed while its base model is the folder {base}; push the base first and train on "
            "its repository, or merge the adapter and push that"
        )


def logits(folder: str):
    """What the model in a folder makes of a fixed text: a tensor (1, tokens, vocabulary), on the CPU.

    Raises:
        UserError: it does not load, or weights are missing or left over.
    """
    try:
        tokenizer = load_tokenizer(folder, folder)
        kind = load_config(adapter_base(folder) or folder).architectures[0]
        model = reload(getattr(transformers, kind), folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} does not load ({_line(error)}); train or export it again") from error
    tokens = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **decoder)[0]


def upload(api: HfApi, repo_id: str, files: dict, message: str, token: str | None, revision: str | None = None):
    """One commit of {path in the repository: local path or bytes}; what the Hub has is not sent again."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def check_visibility(api: HfApi, repo_id: str, private: bool, token: str | None) -> None:
    """Raise `UserError` if what should stay private would become public."""
    if private and not api.model_info(repo_id, token=token).private:
        raise UserError(
            f"{repo_id} is public already; push with --public (hub_private_repo false), or to another repository"
        )


@contextmanager
def user_error_on_failed_push(what: str, repo_id: str, remedy: str) -> Iterator[None]:
    """Turn what the Hub and the way there can do into a `UserError`: what happened, why, the remedy."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{what}: {why(error, repo_id)}; {remedy}") from error


def why(error: BaseException, repo_id: str) -> str:
    """The reason of a failed push, in words."""
    while error.__cause__ and not isinstance(error, HTTPError):  # an upload wraps what happened
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no {repo_id}, or the token may not see it"
    if status in (401, 403):
        return f"the token may not write to {repo_id} (status {status})"
    if status:
        return f"the Hub answers with status {status}"
    if isinstance(error, HTTPError | ConnectionError):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return _line(error)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class PushMixin:
    """Pushes of `Trainer` and its subclasses: private, whole, without optimizer states; and failures are told."""

    _api: HfApi | None = None  # its one background thread keeps commits in order
    _pushes: tuple = ()  # on their way
    _pickles_announced = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, private unless `hub_private_repo` is false; a bad name is refused before training."""
        for adapter in getattr(self.model, "peft_config", {}).values():
            check_base(adapter.base_model_name_or_path)
        private = self.args.hub_private_repo is not False if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with user_error_on_failed_push("push_to_hub", name, "set hub_model_id to a repository that is yours"):
            super().init_hf_repo(token, private)
            if self.is_world_process_zero():
                check_visibility(HfApi(), self.hub_model_id, private, token or self.args.hub_token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet: the checkpoint is still being written, and Trainer would push the optimizer's state beside it."""

    def push_checkpoint(self, checkpoint: str) -> None:
        """In the background, push the model of a whole checkpoint, and all of it where `hub_strategy` says so.

        One that comes while another is on its way is left out, unless `hub_always_push`.
        """
        args = self.args
        if not args.push_to_hub or args.hub_strategy == "end" or not self.is_world_process_zero():
            return
        self._tell_failed([job for job in self._pushes if job.done()])
        if self._pushes and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Links outlive the checkpoint, which a newer one may replace before it has been sent.
        aside = Path(args.output_dir, "pushing", Path(checkpoint).name)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, aside, symlinks=True, copy_function=_link)
            files = {path: aside / path for path in contents(aside)[0]}
            if args.hub_strategy in ("checkpoint", "all_checkpoints"):
                inside = "last-checkpoint" if args.hub_strategy == "checkpoint" else aside.name
                whole = files_of_checkpoint(aside)
                self._announce_pickles(whole)
                files |= {f"{inside}/{path}": aside / path for path in whole}
        except OSError as error:  # a full disk without links: no reason to stop training
            return self._tell(error)
        message = f"Training in progress, step {self.state.global_step}"

        def job():
            try:
                check_secrets(aside, {path.relative_to(aside).as_posix() for path in files.values()}, get_token())
                return upload(self._api, self.hub_model_id, files, message, args.hub_token, args.hub_revision)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

        self._api = self._api or HfApi()
        self._pushes = (*self._pushes, self._api.run_as_future(job))

    def _announce_pickles(self, paths: list[str]) -> None:
        pickles = pickles_among(paths)
        if pickles and not self._pickles_announced:
            self._pickles_announced = True
            strategy = HubStrategy(self.args.hub_strategy).value
            print(
                f"hub_strategy {strategy} pushes pickles ({', '.join(pickles)}): to load one runs the "
                "code in it, so resume only from repositories that nobody else can write to",
                flush=True,
            )

    def _tell(self, error: BaseException) -> None:
        reason = why(error, self.hub_model_id)
        print(f"warning: a push during training failed: {reason}", file=sys.stderr, flush=True)

    def _tell_failed(self, jobs) -> None:
        """Wait for the jobs, and tell which failed; Trainer itself says nothing."""
        for error in filter(None, (job.exception() for job in jobs)):
            self._tell(error)
        self._pushes = tuple(job for job in self._pushes if job not in jobs)

    def _finish_current_push(self) -> None:
        if self._pushes:
            self._tell_failed(self._pushes)
            shutil.rmtree(Path(self.args.output_dir, "pushing"), ignore_errors=True)

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> str | None:
        """Push the finished folder as it lies on disk, and check what arrived; see `push`."""
        if self.hub_model_id is None:
            self.init_hf_repo()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        args = self.args
        more = {"token": args.hub_token, "revision": args.hub_revision, "message": commit_message, "create": False}
        return push(args.output_dir, self.hub_model_id, private=args.hub_private_repo is not False, **more)


def report_finished_run(args) -> None:
    """Say that a run is finished already, and push its folder where `push_to_hub` asks for it and no push is recorded.

    A run may have been killed, or have lost the network, between its last file and the end of its push; or it is to be
    pushed to another repository now.

    Raises:
        UserError: as `push` does, or another process holds the folder.
    """
    if args.process_index:
        return
    print(f"{args.output_dir} holds this run, finished; delete the folder to train again")
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with suppress(OSError):  # of a folder that can only be read, in which nobody trains
        hold_output_dir(args.output_dir)  # the run itself may be pushing
    if known := pushed_to(args.output_dir, name, args.hub_revision):
        print(f"it has been pushed to {known}")
        return
    print(f"it has not been pushed to {name} yet, which is done now", flush=True)
    private = args.hub_private_repo is not False
    more = {"token": args.hub_token, "revision": args.hub_revision, "message": "End of training"}
    push(args.output_dir, name, private=private, **more)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
