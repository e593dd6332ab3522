"""What happens in the process of a run before its script: its changes are watched, its batches are recorded."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from changes import Mode, watch


@dataclass(frozen=True)
class Setup:
    """To be called in the new process, which it makes the first of a process group of its own."""

    folder: Path  # to watch
    records: Path  # outside of it: `changes` and `batches` of the run
    mode: Mode
    number: int

    def __call__(self) -> None:
        os.setsid()
        self.records.mkdir(parents=True, exist_ok=True)
        skip_sampling()
        record_batches(self.records / "batches")
        watch(os.environ["LD_PRELOAD"], self.folder, self.records / "changes", self.mode, self.number)


def skip_sampling() -> None:
    """Sampling takes longer than all the rest of such a run, and writes nothing."""
    transformers.GenerationMixin.generate = lambda self, ids=None, input_ids=None, **options: (
        input_ids if ids is None else ids
    )


def record_batches(log: Path) -> None:
    """Append a line for each micro-batch: the step that it is for, and a hash of its tensors."""
    original = transformers.Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for name, value in sorted(inputs.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
            else:
                digest.update(repr(value).encode())
        with open(log, "a", encoding="utf-8") as handle:
            handle.write(f"{self.state.global_step + 1} {digest.hexdigest()[:16]}\n")
        return original(self, model, inputs, *args, **kwargs)

    transformers.Trainer.training_step = training_step
