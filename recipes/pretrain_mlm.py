"""Masked tokens (BERT style, the Cloze task), from scratch or continued.

    python recipes/pretrain_mlm.py --config recipes/configs/tiny/pretrain_mlm.yaml
    accelerate launch --config_file ds_configs/ddp.yaml recipes/pretrain_mlm.py \\
        --config recipes/configs/modernbert-base/pretrain_mlm.yaml

Every key of the YAML is an option of the command line too. The same command again resumes where it stopped.
"""

from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, set_seed

from unlabeled import exit_on_user_error
from unlabeled.config import DataArguments, MaskingArguments, ModelArguments, PretrainingArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.randomness import EVALUATION_SEED
from unlabeled.data.rows import TrainingRows
from unlabeled.data.sources import parse_sources
from unlabeled.data.streams import StreamedRows
from unlabeled.data.summary import describe_dataset
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push
from unlabeled.models.attention import check_isolation, sliding_window, takes_lengths
from unlabeled.models.loading import fit_to_tokenizer, from_scratch, load_pretrained, reload, scratch_config
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import BuildOptimizer
from unlabeled.reporting.lineage import non_default_arguments, parent_of
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.training import ExactTrainer, finish
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "mlm"
EVALUATION_RATE = 0.15  # of all figures that compare runs, whatever rate they train at


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, masking_args, training_args = parse_arguments(
        ModelArguments, DataArguments, MaskingArguments, PretrainingArguments
    )
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Data: text is tokenised and packed once, then found again by its fingerprint -------------------------------
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    if added := ensure_pad_token(tokenizer):
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
        model = load_pretrained(AutoModelForMaskedLM, model_args.model_name_or_path, model_args.attn_implementation)
        fit_to_tokenizer(model, tokenizer, training_args.max_length)
    else:
        config = scratch_config(model_args.model_type, model_args.config_overrides, tokenizer, training_args.max_length)
        model = from_scratch(AutoModelForMaskedLM, config, model_args.attn_implementation)
    model.to(training_args.device)  # where Trainer puts it, so that what is tried out below is tried there

    # --- Collators: masks come from (seed, epoch, row); evaluation has fixed ones, at 15 % and at the training rate --
    def masking(seed: int, mlm_probability: float) -> DataCollatorForPackedLanguageModeling:
        return DataCollatorForPackedLanguageModeling(
            tokenizer,
            mlm=True,
            mlm_probability=mlm_probability,
            mask_replace_prob=masking_args.mask_replace_prob,
            random_replace_prob=masking_args.random_replace_prob,
            whole_word_mask=masking_args.whole_word_mask,
            seed=seed,
            max_length=training_args.max_length,
            isolate_documents=data_args.isolate_documents,
            sliding_window=sliding_window(model.config),
            flat=takes_lengths(model.config),
        )

    collator = masking(training_args.seed, masking_args.mlm_probability)

    # --- Loss: the output head is computed where there is a target, a few positions at a time -----------------------
    loss = ChunkedLinearCrossEntropy(model, shift=False, target_share=masking_args.mlm_probability)

    # --- Plan -------------------------------------------------------------------------------------------------------
    isolation = check_isolation(model, collator)
    estimate = estimate_run(model, training_args, manifest, loss.head_share)
    resolve_compile(training_args, estimate.costs.flops)
    plan = make_run_plan(model, training_args, manifest, estimate, isolation, model_args.model_name_or_path)
    identity = run_identity(
        manifest, tokenizer, model_args, masking_args, training_args, isolate_documents=data_args.isolate_documents
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
        eval_collator=masking(EVALUATION_SEED, EVALUATION_RATE),
    )
    progress = add_token_progress(trainer, plan)

    # --- Train, or resume from the newest complete checkpoint -------------------------------------------------------
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())

    # --- Evaluate, save, and leave everything that a reader of the folder needs -------------------------------------
    metrics = trainer.evaluate()
    at_training_rate = trainer.token_sums(masking(EVALUATION_SEED, masking_args.mlm_probability))
    metrics |= {"eval_loss_at_training_rate": at_training_rate.loss, "mlm_probability": masking_args.mlm_probability}
    trainer.save_model()
    if trainer.is_world_process_zero():
        model = reload(AutoModelForMaskedLM, training_args.output_dir, trainer.model)
        places = [len(rows["validation"]) * quarter // 4 for quarter in (1, 2, 3)]
        sentences = [openings(tokenizer, row) for row in rows["validation"].select(places)]
        finish(
            trainer,
            plan,
            manifest,
            metrics=metrics | {"expected_seconds": progress.expected_seconds},
            configuration=non_default_arguments(model_args, data_args, masking_args, training_args)
            | {"objective": OBJECTIVE},
            parent=parent_of(model_args.model_name_or_path),
            samples=filled_masks(model, tokenizer, sentences),
            example=with_mask(tokenizer, sentences[0])[0],
        )
        say(f"\n{Path(training_args.output_dir, 'samples.md').read_text(encoding='utf-8')}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


def openings(tokenizer, row: dict) -> str:
    """The first words of a held-out row."""
    return tokenizer.decode(row["input_ids"][:48], skip_special_tokens=True)


def with_mask(tokenizer, sentence: str, every: int = 5) -> tuple[str, list[str]]:
    """The sentence with each fifth plain word masked, and the words that were there.

    The name of the mask token, where a text has it, is left out: the tokenizer would read it as one more mask.
    """
    while tokenizer.mask_token in sentence:  # what is left may be that name again
        sentence = sentence.replace(tokenizer.mask_token, " ")
    words = sentence.split()
    plain = [place for place, word in enumerate(words) if word.isalpha()][every // 2 :: every]
    hidden = [words[place] for place in plain]
    for place in plain:
        words[place] = tokenizer.mask_token
    return " ".join(words), hidden


def filled_masks(model, tokenizer, sentences: list[str]) -> str:
    """Markdown: each masked sentence of held-out text, and the model's five best guesses for each mask."""
    lines = [
        "Some words of held-out text are masked. One mask is one token, the guesses are the five most probable.",
        "",
    ]
    for sentence in sentences:
        masked, hidden = with_mask(tokenizer, sentence)
        inputs = tokenizer(masked, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        lines += [f"> {masked}", "", "| hidden word | guesses |", "|---|---|"]
        positions = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
        for word, position in zip(hidden, positions, strict=True):
            best = logits[position].softmax(-1).topk(5)
            guesses = [f"{tokenizer.decode([i])} ({p:.0%})" for p, i in zip(best.values, best.indices, strict=True)]
            lines.append(f"| {word} | {', '.join(guesses)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
