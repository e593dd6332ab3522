"""Checkpoints of `Trainer` that are complete or absent, exports in the Hugging Face layout, and resuming."""

import io
import os
import shutil
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from unlabeled.errors import UserError
from unlabeled.hub.trainer_mixin import PushMixin
from unlabeled.models.exports import rename_dora_magnitudes
from unlabeled.runtime.checkpoints import (
    commit_checkpoint,
    delete_old_checkpoints,
    find_newest_checkpoint,
    staging_folder,
)
from unlabeled.runtime.processes import start_answering, stop_answering, wait_for_all
from unlabeled.runtime.write_errors import user_error_on_failed_write


def count_processes(checkpoint: str) -> int:
    """The number of processes that wrote a checkpoint, each of which saves its random state."""
    return sum(name.startswith("rng_state") for name in os.listdir(checkpoint))


def remove_leftovers(output_dir: str) -> None:
    """Delete what a killed run left half-written: its staging folder, and temporary files of safetensors."""
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)
    for file in Path(output_dir).glob(".tmp??????"):  # named by Rust's tempfile
        file.unlink(missing_ok=True)


def make_universal(checkpoint: str, folder: str) -> None:
    """Copy a ZeRO checkpoint with its shards merged by parameter (universal checkpoints, arXiv:2406.18820)."""
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    shards = os.path.join(folder, Path(folder, "latest").read_text(encoding="utf-8").strip())
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with redirect_stdout(io.StringIO()):  # it logs verbosely
        main(Namespace(input_folder=shards, output_folder=f"{shards}_universal", inject_missing_state=True, **options))


class BestCheckpointPath(TrainerCallback):
    """Restores the path of the best checkpoint; on disk the state has its step only, as a path names the machine."""

    def on_train_begin(self, args, state, control, **kwargs):
        best = os.path.join(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step and os.path.isdir(best):
            state.best_model_checkpoint = best


class SavingMixin(PushMixin):
    """Checkpoints, exports and pushes for `Trainer` and its subclasses."""

    _staging = False

    def newest_checkpoint(self) -> str | None:
        """The newest complete checkpoint of this run, verified by the first process for all of them."""
        checkpoints: list[str | None] = [None]
        if self.args.process_index == 0:
            checkpoints = [find_newest_checkpoint(self.args.output_dir)]
            remove_leftovers(self.args.output_dir)
        (checkpoint,) = broadcast_object_list(checkpoints)
        if checkpoint and self.args.process_index == 0:
            print(f"resuming from {checkpoint}")
        return checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save in the Hugging Face layout, with `use_cache` on in an exported model, where training has it off."""
        use_cache_in_training = self.model.config.use_cache
        self.model.config.use_cache = not _internal_call
        try:
            with nullcontext() if _internal_call else user_error_on_failed_write(self.args.output_dir, "the model"):
                super().save_model(output_dir, _internal_call=True)
        finally:  # a cache disables the isolation of documents, which would change the loss of later evaluations
            self.model.config.use_cache = use_cache_in_training
        if _internal_call:  # all processes get here; a collective with a timeout may follow
            self._wait_for_writes()
            if self.args.should_save:
                start_answering()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write tied weights once, and nothing that is secret.

        DeepSpeed passes copies, in which tied weights are separate tensors.
        """
        if state_dict:
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        # It may hold hub_token; lineage.json has everything else.
        Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        file = os.path.join(folder, "adapter_model.safetensors")
        if os.path.exists(file):
            save_file(rename_dora_magnitudes(load_file(file)), f"{file}.new", metadata={"format": "pt"})
            os.replace(f"{file}.new", file)  # the tensors are mapped from the old file

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card that `export` writes, which a push would replace by Trainer's own."""

    def _for_these_processes(self, checkpoint: str) -> str:
        """A checkpoint that this number of processes can load: for ZeRO, a copy with merged shards."""
        before = count_processes(checkpoint)
        now = self.args.world_size
        is_first = self.args.process_index == 0
        if before == now:
            return checkpoint
        if is_deepspeed_zero3_enabled():  # its universal checkpoints changed biases by 1e-5 (docs/LOG.md)
            raise UserError(
                f"{checkpoint} holds the ZeRO-3 shards of {before} processes, not {now}; resume with {before}"
            )
        if is_first:
            print(f"saved by {before} processes, continued by {now}: dropout draws other random numbers")
        if not self.is_deepspeed_enabled:
            return checkpoint
        folder = os.path.join(staging_folder(self.args.output_dir), "universal")
        if is_first:
            make_universal(checkpoint, folder)
        self.accelerator.wait_for_everyone()
        self.args.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        return folder

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state of each process, or seed it where their number changed; only dropout draws from it."""
        if checkpoint is None:
            return
        if count_processes(checkpoint) == self.args.world_size:
            return super()._load_rng_state(checkpoint)
        set_seed(self.args.seed + self.state.global_step * self.args.world_size + self.args.process_index)

    def _get_output_dir(self, trial) -> str:
        return staging_folder(self.args.output_dir) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write into a staging folder and rename it, so that a checkpoint is complete or absent after a kill."""
        name = f"checkpoint-{self.state.global_step}"
        folder = staging_folder(self.args.output_dir)
        with self.timer.paused("saving"), self.watchdog.watching_files(folder):
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = True
            if self.args.should_save:
                start_answering()
            try:
                with user_error_on_failed_write(self.args.output_dir, name):
                    super()._save_checkpoint(model, trial)
                    best = f"checkpoint-{self.state.best_global_step}"
                    if self.state.best_global_step:  # Trainer looks for it in the staging folder
                        self.state.best_model_checkpoint = os.path.join(self.args.output_dir, best)
                    if hasattr(self.train_dataset, "save"):
                        staged = os.path.join(self._get_output_dir(trial), name)
                        self.train_dataset.save(staged, self.state.global_step, self.args.process_index)
                    self._wait_for_writes()
                    if self.args.should_save:
                        start_answering()
                        self._write_state(os.path.join(self._get_output_dir(trial), name))
                        commit_checkpoint(self.args.output_dir, name, progress=self.watchdog.beat)
                        delete_old_checkpoints(self.args.output_dir, self.args.save_total_limit, best)
            except BaseException:
                stop_answering()  # other processes must not wait for one that has failed
                raise
            finally:
                self._staging = False
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
            self._wait_for_writes()
        self.push_checkpoint(os.path.join(self.args.output_dir, name))

    def _write_state(self, checkpoint: str) -> None:
        """Save the state without the path of the best checkpoint, and remove PEFT's card, which names a path as well.

        `BestCheckpointPath` restores the path from the step of the best checkpoint.
        """
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = None
        try:
            self.state.save_to_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        finally:
            self.state.best_model_checkpoint = best
        Path(checkpoint, "README.md").unlink(missing_ok=True)

    def _wait_for_writes(self) -> None:
        """Wait for the process that writes, without a timeout: its own watchdog ends it if it hangs."""
        with self.watchdog.paused():
            wait_for_all()
