"""Pushes of a Trainer: a private repository, pushes in the background while it trains, and one at its end."""

import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from transformers.trainer_utils import HubStrategy

from unlabeled.hub.client import (
    check_visibility,
    commit_files,
    create_repository,
    describe_push_failure,
    user_error_on_failed_push,
)
from unlabeled.hub.contents import check_secrets, find_pickles, find_push_contents, list_checkpoint_files
from unlabeled.hub.preconditions import check_adapter_base
from unlabeled.hub.push import push

STAGING = "pushing"  # the folder in `output_dir` of checkpoints that are being pushed


class PushMixin:
    """Replaces the pushes of `Trainer`: complete checkpoints, without optimizer states, and each failure is reported.

    A push during training that fails is a warning. The push at the end raises.
    """

    _push_api: HfApi | None = None  # its one background thread keeps the commits in order
    _pending_pushes: tuple[Future, ...] = ()
    _pickles_announced = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, private unless `hub_private_repo` is false.

        Raises:
            UserError: The name is not valid, the token may not write there, or the repository is public.
        """
        for adapter in getattr(self.model, "peft_config", {}).values():
            check_adapter_base(adapter.base_model_name_or_path)
        if not self.is_world_process_zero():
            return
        args = self.args
        if private is None:
            private = args.hub_private_repo is not False
        token = token or args.hub_token
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        with user_error_on_failed_push("push_to_hub", name, "set hub_model_id to a repository that is yours"):
            self.hub_model_id = create_repository(name, private, token)
            check_visibility(self.hub_model_id, private, token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: Trainer calls this while the checkpoint is being written; see `push_checkpoint`."""

    def push_checkpoint(self, checkpoint: str) -> None:
        """Push the model of a complete checkpoint in the background; with its optimizer if `hub_strategy` says so.

        While another push is on its way, nothing is done unless `hub_always_push` is set.
        """
        args = self.args
        if not args.push_to_hub or args.hub_strategy == "end" or not self.is_world_process_zero():
            return
        self._finish_pushes([future for future in self._pending_pushes if future.done()])
        if self._pending_pushes and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Hard links outlive the checkpoint, which may be deleted before it has been sent.
        staged = Path(args.output_dir, STAGING, Path(checkpoint).name)
        shutil.rmtree(staged, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, staged, symlinks=True, copy_function=_link_or_copy)
            files = self._select_checkpoint_files(staged)
        except OSError as error:  # such as a full disk without hard links: no reason to stop training
            self._warn_of_failure(error)
            return
        message = f"Training in progress, step {self.state.global_step}"

        def check_and_commit() -> CommitInfo:
            try:
                paths = {path.relative_to(staged).as_posix() for path in files.values()}
                check_secrets(staged, paths, get_token())
                return commit_files(api, self.hub_model_id, files, message, args.hub_token, args.hub_revision)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        api = self._push_api or HfApi()
        self._push_api = api
        self._pending_pushes = (*self._pending_pushes, api.run_as_future(check_and_commit))

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> str | None:
        """Push the finished folder as it is on disk and check what arrived; see `unlabeled.hub.push.push`."""
        if self.hub_model_id is None:
            self.init_hf_repo()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        args = self.args
        return push(
            args.output_dir,
            self.hub_model_id,
            private=args.hub_private_repo is not False,
            token=args.hub_token,
            revision=args.hub_revision,
            message=commit_message,
            create=False,  # who deleted it during training did not want it
        )

    def _select_checkpoint_files(self, checkpoint: Path) -> dict[str, Path]:
        """The files to push of a checkpoint, by their paths in the repository."""
        files = {path: checkpoint / path for path in find_push_contents(checkpoint)[0]}
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folder = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            paths = list_checkpoint_files(checkpoint)
            self._announce_pickles(paths, strategy)
            files |= {f"{folder}/{path}": checkpoint / path for path in paths}
        return files

    def _announce_pickles(self, paths: Iterable[str], strategy: HubStrategy) -> None:
        pickles = find_pickles(paths)
        if pickles and not self._pickles_announced:
            self._pickles_announced = True
            print(
                f"hub_strategy {strategy.value} pushes pickles ({', '.join(pickles)}): to load one runs the "
                "code in it, so resume only from repositories that nobody else can write to",
                flush=True,
            )

    def _warn_of_failure(self, error: BaseException) -> None:
        reason = describe_push_failure(error, self.hub_model_id)
        print(f"warning: a push during training failed: {reason}", file=sys.stderr, flush=True)

    def _finish_pushes(self, futures: Iterable[Future]) -> None:
        """Wait for pushes and warn of each one that failed, as Trainer says nothing."""
        for future in futures:
            error = future.exception()
            if error is not None:
                self._warn_of_failure(error)
        self._pending_pushes = tuple(future for future in self._pending_pushes if future not in futures)

    def _finish_current_push(self) -> None:
        """Wait for all pushes; Trainer calls this at the end of training."""
        if self._pending_pushes:
            self._finish_pushes(self._pending_pushes)
            shutil.rmtree(Path(self.args.output_dir, STAGING), ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
