"""Span corruption (T5 style): spans of a text are left out, and an encoder-decoder restores them.

    python recipes/pretrain_span.py --config recipes/configs/tiny/pretrain_span.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/pretrain_span.py \\
        --config recipes/configs/t5-base/pretrain_span.yaml

Every key of the YAML is an option of the command line too. The same command again resumes where it stopped.
"""

from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, set_seed

from unlabeled import exit_on_user_error
from unlabeled.config import DataArguments, ModelArguments, PretrainingArguments, SpanArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.collators import DataCollatorForSpanCorruption
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.randomness import EVALUATION_SEED
from unlabeled.data.rows import EvaluationRows, TrainingRows
from unlabeled.data.sources import parse_sources
from unlabeled.data.span_corruption import add_span_tokens, spans_by_sentinel
from unlabeled.data.streams import StreamedRows
from unlabeled.data.summary import describe_dataset
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push
from unlabeled.models.attention import check_isolation, separate_cross_attention_mask
from unlabeled.models.loading import fit_to_tokenizer, from_scratch, load_pretrained, reload, scratch_config
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import BuildOptimizer
from unlabeled.reporting.lineage import non_default_arguments, parent_of
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.training import ExactTrainer, finish
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "span"
RESTORED_ROWS = 256  # held-out rows of whose first text the spans are restored word by word


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, span_args, training_args = parse_arguments(
        ModelArguments, DataArguments, SpanArguments, PretrainingArguments
    )
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Data: text is tokenised and packed once, then found again by its fingerprint -------------------------------
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    if added := ensure_pad_token(tokenizer):
        say(added)
    if added := add_span_tokens(tokenizer, span_args.mixture, training_args.max_length):
        say(added)
    sources = parse_sources(data_args.train_data, "train_data", data_args.text_column)
    with training_args.main_process_first(desc="preparing the text") as is_first:
        folder = prepare(
            train=[] if data_args.stream else sources,
            evaluation=parse_sources(data_args.eval_data or [], "eval_data", data_args.text_column),
            tokenizer=tokenizer,
            objective=OBJECTIVE,
            max_length=training_args.max_length,
            cache_dir=data_args.prepared_dir,
            eval_fraction=data_args.eval_fraction,
            max_tokens=data_args.max_tokens,
            denoisers=span_args.mixture,
        )
        rows, manifest = load_prepared(folder, verify=is_first)
    if data_args.stream:  # tokenised and packed while it trains
        train_rows = StreamedRows(sources, tokenizer, manifest, training_args)
        manifest = train_rows.manifest
    else:
        total = training_args.max_steps * training_args.rows_per_step
        train_rows = TrainingRows(rows["train"], total, training_args.seed)
    say(describe_dataset(manifest))

    # --- Model: from scratch or continued, weights in float32 -------------------------------------------------------
    if model_args.model_name_or_path:
        model = load_pretrained(AutoModelForSeq2SeqLM, model_args.model_name_or_path, model_args.attn_implementation)
        fit_to_tokenizer(model, tokenizer, training_args.max_length)
    else:
        config = scratch_config(model_args.model_type, model_args.config_overrides, tokenizer, training_args.max_length)
        model = from_scratch(AutoModelForSeq2SeqLM, config, model_args.attn_implementation)
    model.config.use_cache = False  # nothing is generated in training; exported as true
    model.to(training_args.device)  # where Trainer puts it, so that what is tried out below is tried there
    model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)

    # --- Collators: spans come from (seed, epoch, row), those of the evaluation are fixed ---------------------------
    def corruption(seed: int) -> DataCollatorForSpanCorruption:
        return DataCollatorForSpanCorruption(
            tokenizer,
            denoisers=span_args.mixture,
            decoder_start_token_id=model.config.decoder_start_token_id,
            seed=seed,
            max_length=training_args.max_length,
            isolate_documents=data_args.isolate_documents,
        )

    collator, eval_collator = corruption(training_args.seed), corruption(EVALUATION_SEED)

    # --- Loss: the output head is computed where there is a target, a few positions at a time -----------------------
    loss = ChunkedLinearCrossEntropy(model, shift=False)

    # --- Plan -------------------------------------------------------------------------------------------------------
    isolation = check_isolation(model, collator)
    estimate = estimate_run(model, training_args, manifest, loss.head_share)
    resolve_compile(training_args, estimate.costs.flops)
    plan = make_run_plan(model, training_args, manifest, estimate, isolation, model_args.model_name_or_path)
    identity = run_identity(
        manifest, tokenizer, model_args, span_args, training_args, isolate_documents=data_args.isolate_documents
    )
    with training_args.main_process_first(local=False) as is_first:
        if acquire_output_dir(training_args.output_dir, identity, plan["disk_bytes"], is_first):
            return report_finished_run(training_args)
    if training_args.process_index == 0:
        print_run_plan(plan)

    # --- Trainer ----------------------------------------------------------------------------------------------------
    trainer = ExactTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=rows["validation"],
        data_collator=collator,
        processing_class=tokenizer,
        compute_loss_func=loss,  # the mean over the target tokens of the whole batch, over all processes
        optimizer_cls_and_kwargs=(BuildOptimizer, training_args.optimizer_kwargs),
        objective=OBJECTIVE,
        splits=manifest["splits"],
        eval_collator=eval_collator,
    )
    progress = add_token_progress(trainer, plan)

    # --- Train, or resume from the newest complete checkpoint -------------------------------------------------------
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())

    # --- Evaluate, save, and leave everything that a reader of the folder needs -------------------------------------
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        model = reload(AutoModelForSeq2SeqLM, training_args.output_dir, trainer.model).to(training_args.device)
        held_out = EvaluationRows(rows["validation"])
        step = -(-len(held_out) // RESTORED_ROWS)
        examples = [held_out[place] for place in range(0, len(held_out), step)]
        restored, samples, example = restore_spans(model, tokenizer, eval_collator, examples)
        finish(
            trainer,
            plan,
            manifest,
            metrics=metrics | restored | {"expected_seconds": progress.expected_seconds},
            configuration=non_default_arguments(model_args, data_args, span_args, training_args)
            | {"objective": OBJECTIVE},
            parent=parent_of(model_args.model_name_or_path),
            samples=samples,
            example=example,
        )
        say(f"\n{Path(training_args.output_dir, 'samples.md').read_text(encoding='utf-8')}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


def restore_spans(model, tokenizer, collator, examples: list[dict]) -> tuple[dict, str, str]:
    """Greedy answers to the first text of each row: the share of spans restored exactly, samples, and one input."""
    pairs, exact, lines = [collator.corrupt_documents(example)[0] for example in examples], [], []
    shown = [len(pairs) * quarter // 4 for quarter in (1, 2, 3)]
    for start in range(0, len(pairs), 32):
        batch = pairs[start : start + 32]
        inputs = tokenizer.pad({"input_ids": [ids.tolist() for ids, _ in batch]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            answers = model.generate(**inputs, max_new_tokens=collator.target_length, do_sample=False, num_beams=1)
        for place, ((ids, target), answer) in enumerate(zip(batch, answers.tolist(), strict=True), start):
            end = [*answer[1:], tokenizer.eos_token_id].index(tokenizer.eos_token_id) + 1
            wanted, given = (
                spans_by_sentinel(target[:-1], collator.sentinels),
                spans_by_sentinel(answer[1:end], collator.sentinels),
            )
            exact += [given.get(sentinel) == tokens for sentinel, tokens in wanted.items()]
            if place in shown:
                lines += [f"```\n{tokenizer.decode(ids[:-1])}\n```", "", "| hidden | restored |", "|---|---|"]
                for sentinel, tokens in wanted.items():
                    both = (tokenizer.decode(part).replace("\n", "⏎") for part in (tokens, given.get(sentinel, [])))
                    lines.append("| {} |".format(" | ".join(f"`{part}`" for part in both)))
                lines.append("")
    share = {"restored_spans": sum(exact) / len(exact), "restored_of": len(exact)}
    about = f"{share['restored_spans']:.1%} of {len(exact):,} spans of held-out text come back exactly. Three texts:"
    return share, "\n".join([f"{about}\n", *lines]), tokenizer.decode(pairs[shown[0]][0][:-1])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
