"""Merge an adapter into its base model: an ordinary folder that loads without PEFT.

    python scripts/merge_adapter.py outputs/smollm2-135m/sft_lora --output_dir outputs/smollm2-135m/sft_merged

The merged model is written aside, loaded back and compared with base and adapter before it gets its name; where logits
differ by more than rounding there is no merged model. It stops generating where its base does. An interrupted merge
leaves nothing, and the same command again begins anew.
"""

import argparse
from pathlib import Path

from unlabeled import UserError, exit_on_user_error
from unlabeled.runtime.files import read_json, read_json_object

TOLERANCE = 1e-4  # of the largest logit at a position, or of 1: what float32 rounds away grows with it
TEXT = "In the beginning there was text, and the text labelled itself."


def check(folder: Path) -> None:
    """Raise `UserError` unless it is the folder of a finished adapter."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the output_dir of a run that trained an adapter")
    if not (folder / "adapter_config.json").is_file():
        what = "a whole model" if (folder / "config.json").is_file() else "no adapter"
        raise UserError(
            f"{folder} holds {what}, nothing to merge; name the output_dir of a run that trained an adapter"
        )
    task = read_json_object(folder / "adapter_config.json", "train the adapter again").get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder} is an adapter for {task}, and CAUSAL_LM can be merged; use it as its card shows")
    if (folder / "run.json").exists() and not (folder / "metrics.json").exists():
        raise UserError(f"{folder} holds an unfinished run; run its command again to finish it")


def is_finished(folder: Path, output_dir: Path) -> bool:
    """Whether this adapter was merged to there already; `UserError` when there is something else."""
    from unlabeled.reporting.lineage import weights_sha256

    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        lineage = read_json(output_dir / "lineage.json")
        is_merged = lineage["stage"] == "merge" and lineage["parent"]["weights"] == weights_sha256(str(folder))
    except (OSError, ValueError, LookupError, TypeError):
        is_merged = False
    if not is_merged:
        raise UserError(f"{output_dir} holds something else than {folder}, merged; set --output_dir to another folder")
    return True


def check_tied(model, where: str) -> None:
    """Raise `UserError` if the embeddings that the configuration calls tied are two different tables."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings and last is not None
    if tied and not (first.weight is last.weight or first.weight.equal(last.weight)):
        raise UserError(
            f"the tied embeddings came apart {where}; train the adapter without them among its modules, or with a base "
            "model of which tie_word_embeddings is false"
        )


def check_logits(before, after, where: str) -> float:
    """The largest difference of a logit; `UserError` when it is more than rounding."""
    difference = (after - before).abs()
    if not (difference / before.abs().amax(-1, keepdim=True).clamp(min=1)).max() <= TOLERANCE:  # NaN too
        raise UserError(
            f"merging changes logits by {difference.max():.1e} {where}, more than rounding does, so there is no merged "
            "model; use base and adapter, or train the adapter on other modules"
        )
    return float(difference.max())


def merge(folder: Path, output_dir: Path) -> None:
    import torch
    from generate import load_folder

    from unlabeled.data.tokenization import tokenizer_fingerprint
    from unlabeled.models.loading import adapter_base, repair_generation_config
    from unlabeled.reporting.lineage import make_lineage, parent_of, write_card
    from unlabeled.runtime.checkpoints import user_error_on_failed_write, write_json
    from unlabeled.runtime.staging import staged_folder

    base = adapter_base(str(folder))
    model, tokenizer, _ = load_folder(str(folder), "cpu")
    repair = repair_generation_config(model.get_base_model(), base)
    if repair:
        print(repair)
    # Special tokens come first: their vectors may be what the adapter has learned.
    ids = torch.tensor([[*sorted(tokenizer.all_special_ids), *tokenizer(TEXT)["input_ids"]]])
    ids = ids[:, : getattr(model.config, "max_position_embeddings", None)]
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        before = model(ids).logits
        model = model.merge_and_unload()
        check_logits(before, model(ids).logits, "in memory")
    check_tied(model, "in memory")
    model.config.use_cache = True
    with (
        user_error_on_failed_write(str(output_dir), "the merged model"),
        staged_folder(output_dir, is_finished=lambda: is_finished(folder, output_dir)) as staged,
    ):
        if staged is None:  # another process has merged it meanwhile
            return print(f"{output_dir} holds this adapter, merged; delete the folder to merge again")
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        parameters, model = model.num_parameters(), None
        model, tokenizer, _ = load_folder(str(staged), "cpu")
        with torch.no_grad():
            difference = check_logits(before, model(ids).logits, "on disk")
        check_tied(model, "on disk")
        metrics = {"logits_difference": difference, "parameters": parameters}
        lineage = make_lineage(
            {"objective": "merge", "base_model_name_or_path": base},
            {"train": [], "evaluation": [], "splits": {}, "fingerprint": None}  # no text of its own
            | {"tokenizer": tokenizer_fingerprint(tokenizer)},
            {"parameters": parameters},
            metrics,
            parent_of(str(folder)),
        )
        write_json(staged / "lineage.json", lineage)
        example = "Tell me a story." if tokenizer.chat_template else "In the beginning"
        write_card(str(staged), lineage, example, name=output_dir.absolute().name)
        write_json(staged / "metrics.json", metrics)
    if tied and not model.config.tie_word_embeddings:  # PEFT notes it in the configuration; the model has grown
        print("the embeddings are no longer tied, as the adapter has learned input and output apart")
    print(
        f"merged: {parameters:,} parameters, logits differ by at most {difference:.1e}; everything is in {output_dir}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a run that trained an adapter", type=Path)
    parser.add_argument("--output_dir", metavar="DIR", help="the folder to make", type=Path, required=True)
    args = parser.parse_args()
    check(args.folder)
    if is_finished(args.folder, args.output_dir):
        return print(f"{args.output_dir} holds this adapter, merged; delete the folder to merge again")
    merge(args.folder, args.output_dir)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
