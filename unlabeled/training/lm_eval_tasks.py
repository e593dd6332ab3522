"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a finished model."""

import os
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_json

BATCH_SIZE = 8
LONGEST_REASON = 300  # characters of an error of lm-eval


def read_tasks(files: list[str]) -> list[dict[str, Any]]:
    """Read tasks, with the paths of their data files resolved.

    Args:
        files: JSON files with the keys of lm-eval's YAML files, beside their data files.

    Raises:
        UserError: lm-eval is not installed, or a file is not a task.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("--tasks needs lm-eval; run `pip install lm_eval==0.4.13`, or leave --tasks out") from error
    return [_read_task(file) for file in files]


def _read_task(file: str) -> dict[str, Any]:
    try:
        task = read_json(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--tasks: cannot read {file} ({reason}); name a task of lm-eval as JSON") from error
    if not isinstance(task, dict) or not {"task", "dataset_path"} <= task.keys():
        raise UserError(f"--tasks: {file} lacks task or dataset_path; give it the keys of a task of lm-eval")
    data_files = (task.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(data_files, dict):
        for split, name in data_files.items():
            path = os.path.join(os.path.dirname(os.path.abspath(file)), name)
            if not os.path.isfile(path):
                raise UserError(f"--tasks: {file} names {path}, which is not there; correct data_files")
            data_files[split] = path
    return task


def run_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[dict[str, Any]],
    max_length: int,
) -> dict[str, float]:
    """Evaluate a causal model as lm-eval's own command does without further options.

    Returns:
        `{"TASK_METRIC": score}`.

    Raises:
        UserError: lm-eval stops, as for wrong keys, columns or templates of a task.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    adapter = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=BATCH_SIZE,
        device=str(model.device),
    )
    try:
        results = lm_eval.simple_evaluate(
            model=adapter, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )["results"]
    except Exception as error:  # whatever a wrong task raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(".: ")[:LONGEST_REASON]
        raise UserError(f"--tasks: lm-eval stops with {type(error).__name__} ({reason}); correct the task") from error
    scores = {}
    for task, values in results.items():
        for name, value in values.items():
            if isinstance(value, int | float) and name != "sample_len":
                scores[f"{task}_{name.removesuffix(',none')}"] = value
    return scores
