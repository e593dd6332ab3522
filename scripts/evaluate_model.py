"""Loss, perplexity and bits per byte of a model, or adapter, on text that it has not seen.

    python scripts/evaluate_model.py outputs/tiny/pretrain_clm --data data/demo/shakespeare/validation.parquet
    python scripts/evaluate_model.py outputs/tiny/sft --data data/demo/shakespeare/validation.parquet --tasks task.json

Nats and tokens are added up over the whole text. Of a masked model it is the loss at 15 % masked tokens, of an
encoder-decoder that of T5's spans (15 %, 3 tokens long on average), always the same ones. A task is one of lm-eval as
JSON: the keys of its YAML files, data files beside it (`pip install lm_eval`).
"""

import argparse
import os
import tempfile
from pathlib import Path

from unlabeled import UserError, exit_on_user_error
from unlabeled.runtime.files import read_json

RATE = 0.15  # masked tokens; of all figures that compare models
LOGITS = 1 << 27  # at a time: 512 MB of float32


def held_out(model, tokenizer, masked: bool, data: list[str], text_column: str, max_length: int) -> dict[str, float]:
    """The figures of raw text, as the pretraining recipes evaluate it."""
    from unlabeled.data.collators import (
        DataCollatorForPackedLanguageModeling,
        DataCollatorForSpanCorruption,
        MaskedCollator,
        prepare_tokenizer,
    )
    from unlabeled.data.preparing import load_prepared, prepare
    from unlabeled.data.randomness import EVALUATION_SEED
    from unlabeled.data.sources import parse_sources
    from unlabeled.data.summary import describe_dataset
    from unlabeled.data.tokenization import ensure_pad_token
    from unlabeled.models.attention import check_isolation, separate_cross_attention_mask, sliding_window
    from unlabeled.planning.spans import Denoiser
    from unlabeled.training.evaluation import figures, token_sums

    objective = "span" if model.config.is_encoder_decoder else "mlm" if masked else "clm"
    denoisers = (Denoiser(),) if objective == "span" else ()
    ends = model.generation_config.eos_token_id if model.can_generate() else None
    if tokenizer.chat_template and isinstance(ends, list):  # raw text ends as it did in pretraining, not as a turn does
        before = [end for end in ends if end != tokenizer.eos_token_id]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(before[0]) if before else tokenizer.eos_token
    ensure_pad_token(tokenizer)
    if denoisers:
        prepare_tokenizer(tokenizer, denoisers, max_length)  # which complains where there are too few sentinels
    sources = parse_sources(data, "--data", text_column)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as cache:
        # The same text is the training split that there has to be.
        folder = prepare(sources, sources, tokenizer, objective, max_length, cache, denoisers=denoisers)
        rows, manifest = load_prepared(folder)
        print(describe_dataset(manifest | {"splits": {"text": manifest["splits"]["validation"]}, "sources": []}))
        if tokenizer.pad_token_id >= model.config.vocab_size:  # nothing sees the padding; one more row changes the loss
            tokenizer.pad_token = tokenizer.eos_token
        if masked:
            window, rate = sliding_window(model.config), {"mlm_probability": RATE}
            collator = MaskedCollator(
                tokenizer, mlm=True, max_length=max_length, seed=EVALUATION_SEED, sliding_window=window, **rate
            )
        elif denoisers:
            start = model.config.decoder_start_token_id
            collator = DataCollatorForSpanCorruption(
                tokenizer, max_length=max_length, seed=EVALUATION_SEED, decoder_start_token_id=start
            )
            model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)
        else:
            collator = DataCollatorForPackedLanguageModeling(tokenizer, mlm=False, max_length=max_length)
        model.config.use_cache = False  # a cache would switch off the isolation by position_ids
        check_isolation(model, collator)
        batch_size = max(1, min(64, LOGITS // (max_length * model.config.vocab_size)))
        shift = objective == "clm"
        sums = token_sums(model, rows["validation"], collator, batch_size, shift=shift, device=model.device)
        split = manifest["splits"]["validation"]
    found = figures(sums, objective, split)
    return found | {key: split[key] for key in ("documents", "bytes", "text_tokens")} | {"max_length": max_length}


def read_tasks(files: list[str]) -> list[dict]:
    """The tasks, with the places of their data files. Raises `UserError` for what is no task of lm-eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("--tasks needs lm-eval; run `pip install lm_eval==0.4.13`, or leave --tasks out") from error
    tasks = []
    for file in files:
        try:
            task = read_json(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--tasks: cannot read {file} ({reason}); name a task of lm-eval as JSON") from error
        if not isinstance(task, dict) or not {"task", "dataset_path"} <= task.keys():
            raise UserError(f"--tasks: {file} lacks task or dataset_path; give it the keys of a task of lm-eval")
        named = (task.get("dataset_kwargs") or {}).get("data_files") or {}
        for split, name in named.items() if isinstance(named, dict) else ():
            named[split] = os.path.join(os.path.dirname(os.path.abspath(file)), name)
            if not os.path.isfile(named[split]):
                raise UserError(f"--tasks: {file} names {named[split]}, which is not there; correct data_files")
        tasks.append(task)
    return tasks


def run_tasks(model, tokenizer, tasks: list[dict], max_length: int) -> dict[str, float]:
    """{"TASK_METRIC": value} from lm-eval, as its own command gives them without further options."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=8, device=str(model.device))
    try:
        results = lm_eval.simple_evaluate(
            model=harness, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )["results"]
    except Exception as error:  # whatever a task with wrong keys, columns or templates raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")[:300]
        raise UserError(f"--tasks: lm-eval stops with {type(error).__name__} ({reason}); correct the task") from error
    return {
        f"{task}_{name.removesuffix(',none')}": value
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float) and name != "sample_len"
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a finished run, a whole model or an adapter")
    parser.add_argument(
        "--data", nargs="+", required=True, help="file, folder or glob of text, or a data set on the Hub"
    )
    parser.add_argument("--text_column", default="text", help="the column that holds the text (default: text)")
    default_length = "the model's positions, at most 1024, or 512 of an encoder-decoder"
    parser.add_argument("--max_length", type=int, help=f"tokens in a row (default: {default_length})")
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-eval, .json files")
    parser.add_argument("--output_dir", help="write metrics.json there")
    args = parser.parse_args()
    tasks = read_tasks(args.tasks) if args.tasks else []

    from unlabeled.models.configs import check_positions
    from unlabeled.models.generation import load_for_generation
    from unlabeled.runtime.files import write_json
    from unlabeled.runtime.write_errors import user_error_on_failed_write

    model, tokenizer, masked = load_for_generation(args.folder)
    default_length = 512 if model.config.is_encoder_decoder else 1024
    max_length = args.max_length or min(
        default_length, getattr(model.config, "max_position_embeddings", None) or default_length
    )
    check_positions(model.config, max_length)
    if tasks and (masked or model.config.is_encoder_decoder):
        raise UserError(f"--tasks: lm-eval asks causal models, and {args.folder} holds another; leave --tasks out")
    scores = run_tasks(model, tokenizer, tasks, max_length) if tasks else {}
    metrics = held_out(model, tokenizer, masked, args.data, args.text_column, max_length) | scores
    compressed = f", {metrics['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in metrics else ""
    print(f"loss {metrics['eval_loss']:.4f} nats per target token, perplexity {metrics['perplexity']:.2f}{compressed}; "
          f"{metrics['targets']:,} targets")  # fmt: skip
    for name, score in scores.items():
        print(f"{name} {score:.4f}")
    if args.output_dir:
        with user_error_on_failed_write(args.output_dir, "the figures"):
            os.makedirs(args.output_dir, exist_ok=True)
            write_json(Path(args.output_dir, "metrics.json"), metrics)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
