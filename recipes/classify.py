"""Sequence classification and regression: texts, or pairs of texts, with a class or a number each, from any model.

    python recipes/classify.py --config recipes/configs/minilm/classify_topics.yaml
    torchrun --nproc_per_node 2 recipes/classify.py --config recipes/configs/minilm/classify_topics.yaml

Numbers with a fraction are learned as numbers, all other labels as classes, unless `problem_type` says otherwise.
The same command again resumes.
"""

from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, set_seed

from unlabeled import exit_on_user_error
from unlabeled.config import AdapterArguments, DownstreamArguments, TaskArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.collators import DataCollatorForClassification
from unlabeled.data.labeled_rows import read_task, task_lines
from unlabeled.data.rows import LengthGroupedRows
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push, check_push_of_own_base
from unlabeled.models.loading import add_adapter, expect_own_base, fit_to_tokenizer, reload, save_own_base
from unlabeled.models.optimizers import BuildOptimizer
from unlabeled.reporting.lineage import non_default_arguments, parent_of
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.training import finish
from unlabeled.training.classification import (
    DownstreamTrainer,
    check_direction,
    check_end_tokens,
    describe_heads,
    describe_pooling,
    label_loss,
    load_labelled,
    reads_type_ids,
    report,
)
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "classify"


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, training_args = parse_arguments(AdapterArguments, TaskArguments, DownstreamArguments)
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Data: texts with a label each, in the order of the whole run -----------------------------------------------
    # Saved with it, so that a pipeline reads the name of a special token as training does: as text.
    tokenizer = load_tokenizer(model_args.model_name_or_path, "model_name_or_path", split_special_tokens=True)
    if added := ensure_pad_token(tokenizer):
        say(added)
    task, splits, manifest = read_task(
        train=parse_sources(data_args.train_data, "train_data"),
        evaluation=parse_sources(data_args.eval_data or [], "eval_data"),
        test=parse_sources(data_args.test_data or [], "test_data"),
        columns=data_args.columns,
        label_column=data_args.label_column,
        words=False,
        tokenizer=tokenizer,
        max_length=training_args.max_length,
        eval_fraction=data_args.eval_fraction,
        problem_type=data_args.problem_type,
    )
    total = training_args.max_steps * training_args.rows_per_step
    train_rows = LengthGroupedRows(
        splits["train"].rows, splits["train"].lengths, total, training_args.seed, training_args.rows_per_step
    )
    training_args.set_token_counts(train_rows.lengths[train_rows.order()])

    # --- Model: weights in float32, the new head drawn alike on all processes ---------------------------------------
    what = (AutoModelForSequenceClassification, model_args, task, tokenizer, data_args.is_causal)
    model, heads = load_labelled(*what)
    fit_to_tokenizer(model, tokenizer, training_args.max_length)
    check_end_tokens(model, splits, model_args.model_name_or_path)
    direction = check_direction(model, data_args.is_causal)
    pooling = describe_pooling(model)
    if model.config.is_encoder_decoder:
        manifest["target_length"] = training_args.max_length  # for the plan: the decoder reads the text as well
    if model_args.adapter != "none":
        check_push_of_own_base(training_args)
        adapter = LoraConfig(
            task_type="SEQ_CLS",
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=model_args.lora_target_modules,
            use_rslora=model_args.adapter == "rslora",
            use_dora=model_args.adapter == "dora",
            modules_to_save=list(heads),  # trained in full
        )
        model = add_adapter(model, adapter)

    # --- Collator: padded to the longest row ------------------------------------------------------------------------
    collator = DataCollatorForClassification(tokenizer.pad_token_id, training_args.max_length, reads_type_ids(model))

    # --- Plan -------------------------------------------------------------------------------------------------------
    estimate = estimate_run(model, training_args, manifest)
    resolve_compile(training_args, estimate.costs.flops)
    plan = make_run_plan(model, training_args, manifest, estimate, "one text in a row", model_args.model_name_or_path)
    plan["lines"] |= task_lines(task, splits) | {
        "attention": direction,
        "head": f"reads {pooling}, {describe_heads(heads)}",
    }
    identity = run_identity(manifest, tokenizer, model_args, data_args, training_args)
    with training_args.main_process_first(local=False) as is_first:
        if acquire_output_dir(training_args.output_dir, identity, plan["disk_bytes"], is_first):
            return report_finished_run(training_args)
    if training_args.process_index == 0:
        print_run_plan(plan)

    # --- Trainer ----------------------------------------------------------------------------------------------------
    trainer = DownstreamTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=splits["validation"],
        data_collator=collator,
        processing_class=tokenizer,
        compute_loss_func=label_loss,  # the mean over the texts of the whole batch, over all processes
        optimizer_cls_and_kwargs=(BuildOptimizer, training_args.optimizer_kwargs),
        objective=OBJECTIVE,
        splits=manifest["splits"],
        task=task,
        test=splits.get("test"),
    )
    progress = add_token_progress(trainer, plan)

    # --- Train, or resume from the newest complete checkpoint -------------------------------------------------------
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())

    # --- Evaluate, save, and leave everything that a reader of the folder needs -------------------------------------
    metrics = trainer.evaluate()
    if trainer.test:
        metrics |= trainer.figures(trainer.test, "test")
    own_base = model_args.adapter != "none"  # with these labels it is on no disk yet
    if own_base:
        expect_own_base(model)
    trainer.save_model()
    if trainer.is_world_process_zero():
        if own_base:
            set_seed(training_args.seed)  # a new head is drawn as it was when training began
            before = load_labelled(*what)[0]
            fit_to_tokenizer(before, tokenizer, training_args.max_length)
            save_own_base(before, tokenizer, training_args.output_dir)
        reload(AutoModelForSequenceClassification, training_args.output_dir, trainer.model)
        finish(
            trainer,
            plan,
            manifest,
            metrics=metrics | {"expected_seconds": progress.expected_seconds},
            configuration=non_default_arguments(model_args, data_args, training_args) | {"objective": OBJECTIVE},
            parent=parent_of(model_args.model_name_or_path),
            samples=report(trainer),
            example=example_of(splits["validation"].texts[0]),
        )
        say(f"\n{Path(training_args.output_dir, 'samples.md').read_text(encoding='utf-8')}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


def example_of(text: list[str]) -> str | dict[str, str]:
    """One text, or a pair as the pipeline takes it."""
    return text[0] if len(text) == 1 else dict(zip(("text", "text_pair"), text, strict=True))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
