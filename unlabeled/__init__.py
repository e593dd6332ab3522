"""What the recipes for training language models from raw text share; `docs/architecture.md` shows the structure."""

import os

from unlabeled.runtime import caches

# TRL reports the model's architecture, the number of processes and the GPU to the Hub whenever a trainer is made. Set
# before huggingface_hub is imported, which reads it once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
caches.use_writable_caches()

from unlabeled.errors import RunFinished, Stopped, UserError, exit_on_user_error  # noqa: E402

__all__ = ["RunFinished", "Stopped", "UserError", "exit_on_user_error"]
__version__ = "0.1.0"
