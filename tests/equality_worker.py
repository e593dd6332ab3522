"""Run several recipes in each process of one launch, so that everything is imported only once.

    torchrun --nproc_per_node 2 tests/equality_worker.py runs.json

`runs.json` is a list of [recipe, [argument, ...]] or [recipe, [argument, ...], log of its batches].
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import transformers
from batch_log import recorded_batches
from conftest import run_recipe

from unlabeled import exit_on_user_error

if __name__ == "__main__":
    # Samples would take longer than the rest of these runs.
    transformers.GenerationMixin.generate = lambda self, ids=None, input_ids=None, **options: (
        input_ids if ids is None else ids
    )
    with exit_on_user_error():
        for recipe, arguments, *log in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            with recorded_batches(Path(log[0])) if log else nullcontext():
                run_recipe(recipe, arguments)
