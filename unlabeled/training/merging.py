"""An adapter merged into its base model, compared with both, and exported with its lineage and card."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlabeled.data.tokenization import tokenizer_fingerprint
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import adapter_base
from unlabeled.models.generation import load_for_generation
from unlabeled.models.generation_config import repair_generation_config
from unlabeled.reporting.lineage import make_lineage, parent_of, weights_sha256
from unlabeled.reporting.model_card import write_card
from unlabeled.runtime.files import read_json, read_json_object, write_json
from unlabeled.runtime.staging import staged_folder
from unlabeled.runtime.write_errors import user_error_on_failed_write

# Largest difference of a logit, relative to the largest logit at its position or to 1: rounding in float32 grows with
# the logits.
TOLERANCE = 1e-4
TEXT = "In the beginning there was text, and the text labeled itself."


def check_adapter_folder(folder: Path) -> None:
    """Raise `UserError` unless `folder` is the output folder of a finished run that trained an adapter."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the output_dir of a run that trained an adapter")
    if not (folder / "adapter_config.json").is_file():
        content = "a whole model" if (folder / "config.json").is_file() else "no adapter"
        raise UserError(
            f"{folder} holds {content}, nothing to merge; name the output_dir of a run that trained an adapter"
        )
    task_type = read_json_object(folder / "adapter_config.json", "train the adapter again").get("task_type")
    if task_type not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{folder} is an adapter for {task_type}, and CAUSAL_LM can be merged; use it as its card shows"
        )
    if (folder / "run.json").exists() and not (folder / "metrics.json").exists():
        raise UserError(f"{folder} holds an unfinished run; run its command again to finish it")


def is_merged(folder: Path, output_dir: Path) -> bool:
    """Whether `output_dir` already holds the adapter of `folder`, merged.

    Raises:
        UserError: `output_dir` holds anything else.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        lineage = read_json(output_dir / "lineage.json")
        merged_weights = lineage["parent"]["weights"] if lineage["stage"] == "merge" else None
    except (OSError, ValueError, LookupError, TypeError):
        merged_weights = None
    if merged_weights is None or merged_weights != weights_sha256(str(folder)):
        raise UserError(f"{output_dir} holds something other than {folder}, merged; set --output_dir to another folder")
    return True


def check_tied_embeddings(model: PreTrainedModel, location: str) -> None:
    """Raise `UserError` if the embeddings that the configuration calls tied are two different tables.

    Args:
        model: the merged model.
        location: "in memory" or "on disk", for the message.
    """
    output_embeddings = model.get_output_embeddings()
    if not model.config.tie_word_embeddings or output_embeddings is None:
        return
    input_weight = model.get_input_embeddings().weight
    output_weight = output_embeddings.weight
    if input_weight is not output_weight and not input_weight.equal(output_weight):
        raise UserError(
            f"the tied embeddings came apart {location}; train the adapter without them among its modules, or with a "
            "base model of which tie_word_embeddings is false"
        )


def check_logits(expected: torch.Tensor, logits: torch.Tensor, location: str) -> float:
    """Compare the logits of the merged model with those of base and adapter.

    Args:
        expected: (rows, length, vocabulary) of base and adapter.
        logits: those of the merged model.
        location: "in memory" or "on disk", for the message.

    Returns:
        The largest absolute difference.

    Raises:
        UserError: it is more than rounding.
    """
    difference = (logits - expected).abs()
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1)
    within_tolerance = (difference / scale).max() <= TOLERANCE  # false for NaN
    if not within_tolerance:
        raise UserError(
            f"merging changes logits by {difference.max():.1e} {location}, more than rounding does, so there is no "
            "merged model; use base and adapter, or train the adapter on other modules"
        )
    return float(difference.max())


def merge_adapter(folder: Path, output_dir: Path) -> None:
    """Merge the adapter of a folder into its base model, as an ordinary folder that loads without PEFT.

    The merged model is written to a staging folder, loaded from there and compared with base and adapter before it gets
    its name. An interrupted merge leaves nothing behind.

    Args:
        folder: output folder of a run that trained an adapter.
        output_dir: the folder to create.

    Raises:
        UserError: the adapter cannot be merged exactly, or the folder cannot be written.
    """
    check_adapter_folder(folder)
    if is_merged(folder, output_dir):
        print(f"{output_dir} holds this adapter, merged; delete the folder to merge again")
        return
    base = adapter_base(str(folder))
    model, tokenizer, _ = load_for_generation(str(folder), "cpu")
    repair = repair_generation_config(model.get_base_model(), base)
    if repair:
        print(repair)
    ids = _probe_ids(model, tokenizer)
    was_tied = model.config.tie_word_embeddings
    with torch.no_grad():
        expected = model(ids).logits
        model = model.merge_and_unload()
        check_logits(expected, model(ids).logits, "in memory")
    check_tied_embeddings(model, "in memory")
    model.config.use_cache = True
    with (
        user_error_on_failed_write(str(output_dir), "the merged model"),
        staged_folder(output_dir, is_finished=lambda: is_merged(folder, output_dir)) as staged,
    ):
        if staged is None:  # another process has merged it meanwhile
            print(f"{output_dir} holds this adapter, merged; delete the folder to merge again")
            return
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        parameters = model.num_parameters()
        del model  # the memory is needed for the one that is loaded
        model, tokenizer, _ = load_for_generation(str(staged), "cpu")
        with torch.no_grad():
            difference = check_logits(expected, model(ids).logits, "on disk")
        check_tied_embeddings(model, "on disk")
        metrics = {"logits_difference": difference, "parameters": parameters}
        _write_results(staged, folder, base, tokenizer, metrics, name=output_dir.absolute().name)
    if was_tied and not model.config.tie_word_embeddings:  # PEFT changes the configuration; the model has grown
        print("the embeddings are no longer tied, as the adapter has learned input and output embeddings separately")
    print(
        f"merged: {parameters:,} parameters, logits differ by at most {difference:.1e}; everything is in {output_dir}"
    )


def _probe_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """int64 (1, length): the special tokens, whose embeddings the adapter may have learned, and a sentence."""
    ids = [*sorted(tokenizer.all_special_ids), *tokenizer(TEXT)["input_ids"]]
    positions = getattr(model.config, "max_position_embeddings", None)
    return torch.tensor([ids[:positions]])


def _write_results(
    staged: Path, adapter: Path, base: str, tokenizer: PreTrainedTokenizerBase, metrics: dict, name: str
) -> None:
    """Write lineage, card and metrics of a merged model."""
    no_data = {"train": [], "evaluation": [], "splits": {}, "fingerprint": None}
    lineage = make_lineage(
        {"objective": "merge", "base_model_name_or_path": base},
        no_data | {"tokenizer": tokenizer_fingerprint(tokenizer)},
        {"parameters": metrics["parameters"]},
        metrics,
        parent_of(str(adapter)),
    )
    write_json(staged / "lineage.json", lineage)
    example = "Tell me a story." if tokenizer.chat_template else "In the beginning"
    write_card(str(staged), lineage, example, name=name)
    write_json(staged / "metrics.json", metrics)
