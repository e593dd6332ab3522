"""Supervised fine-tuning on conversations, all weights or an adapter.

    python recipes/sft.py --config recipes/configs/smollm2-135m/sft_lora.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/sft.py --config recipes/configs/llama-1b/sft.yaml

Only what the assistant says is learned, with the token that ends its turn. The same command again resumes.
"""

from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTTrainer

from unlabeled import UserError, exit_on_user_error
from unlabeled.config import FineTuningArguments, SFTArguments, SourceArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.chat_templates import set_chat_template, stop_at_end_of_turn
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.conversations import show_targets
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.rows import training_order
from unlabeled.data.sources import parse_sources
from unlabeled.data.summary import describe_dataset
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer, vocabulary_size
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push, check_push_of_own_base
from unlabeled.models.attention import check_isolation, takes_lengths
from unlabeled.models.loading import (
    add_adapter,
    expect_own_base,
    fit_to_tokenizer,
    load_for_tuning,
    reload,
    rows_of_tokens,
    save_own_base,
)
from unlabeled.models.optimizers import BuildOptimizer
from unlabeled.reporting.lineage import non_default_arguments, parent_of
from unlabeled.reporting.replies import compare_replies, first_prompts
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.training import ExactTrainerMixin, finish
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "sft"


class ExactSFTTrainer(ExactTrainerMixin, SFTTrainer):
    """TRL's trainer with exact evaluation and resume; its loss is the mean over the target tokens of a whole batch."""


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, training_args = parse_arguments(FineTuningArguments, SourceArguments, SFTArguments)
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Data: conversations go through the chat template and are packed once ---------------------------------------
    tokenizer = load_tokenizer(model_args.model_name_or_path, "model_name_or_path")
    if added := ensure_pad_token(tokenizer):
        say(added)
    new_tokens = set_chat_template(tokenizer, model_args.chat_template)
    with training_args.main_process_first(desc="preparing the conversations") as is_first:
        folder = prepare(
            train=parse_sources(data_args.train_data, "train_data"),
            evaluation=parse_sources(data_args.eval_data or [], "eval_data"),
            tokenizer=tokenizer,
            objective=OBJECTIVE,
            max_length=training_args.max_length,
            cache_dir=data_args.prepared_dir,
            eval_fraction=data_args.eval_fraction,
        )
        rows, manifest = load_prepared(folder, verify=is_first)
    say(describe_dataset(manifest))
    say(f"what is learned: {show_targets(tokenizer, rows['train'][0])}")
    total = training_args.max_steps * training_args.rows_per_step
    train_rows = rows["train"].select(training_order(len(rows["train"]), total, training_args.seed))

    # --- Model: weights in float32, the vectors of new tokens are the mean of the others ----------------------------
    model = load_for_tuning(model_args)
    changed = stop_at_end_of_turn(model, tokenizer) or vocabulary_size(tokenizer) > model.config.vocab_size
    if changed and isinstance(model, PeftModel):
        raise UserError(f"{model_args.model_name_or_path} is an adapter; merge it before you change its chat template")
    fit_to_tokenizer(model, tokenizer, training_args.max_length)
    model.config.use_cache = False  # a cache would switch off the isolation by position_ids; exported as true
    if model_args.adapter != "none" and not isinstance(model, PeftModel):  # an adapter that is there is trained on
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=model_args.lora_target_modules,
            use_rslora=model_args.adapter == "rslora",
            use_dora=model_args.adapter == "dora",
            trainable_token_indices=rows_of_tokens(model, tokenizer.convert_tokens_to_ids(new_tokens)),
        )
        model = add_adapter(model, adapter)
    own_base = changed and model_args.adapter != "none"  # what the adapter is to be loaded onto is on no disk yet
    if own_base:
        check_push_of_own_base(training_args)

    if model_args.adapter != "qlora":  # which is there already
        model.to(training_args.device)  # where Trainer puts it, so that what is tried out below is tried there

    # --- Collator: prompts and padding carry no loss; conversations of a row do not see each other ------------------
    flat = takes_lengths(model.config)
    collator = DataCollatorForPackedLanguageModeling(
        tokenizer, mlm=False, max_length=training_args.max_length, flat=flat
    )

    # --- Plan -------------------------------------------------------------------------------------------------------
    estimate = estimate_run(model, training_args, manifest)
    resolve_compile(training_args, estimate.costs.flops)
    isolation = check_isolation(model, collator)
    plan = make_run_plan(model, training_args, manifest, estimate, isolation, model_args.model_name_or_path)
    identity = run_identity(manifest, tokenizer, model_args, training_args)
    with training_args.main_process_first(local=False) as is_first:
        if acquire_output_dir(training_args.output_dir, identity, plan["disk_bytes"], is_first):
            return report_finished_run(training_args)
    if training_args.process_index == 0:
        print_run_plan(plan)

    # --- Trainer ----------------------------------------------------------------------------------------------------
    trainer = ExactSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=rows["validation"],
        data_collator=collator,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(BuildOptimizer, training_args.optimizer_kwargs),
        objective=OBJECTIVE,
        splits=manifest["splits"],
    )
    progress = add_token_progress(trainer, plan)

    # --- Train, or resume from the newest complete checkpoint -------------------------------------------------------
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())

    # --- Evaluate, save, and leave everything that a reader of the folder needs -------------------------------------
    metrics = trainer.evaluate()
    if own_base:
        expect_own_base(model)
    trainer.save_model()
    if trainer.is_world_process_zero():
        before = load_for_tuning(model_args, alone=True)
        fit_to_tokenizer(before, tokenizer, training_args.max_length)
        stop_at_end_of_turn(before, tokenizer)
        if own_base:
            save_own_base(before, tokenizer, training_args.output_dir)
        after = reload(AutoModelForCausalLM, training_args.output_dir, trainer.model)
        prompts = first_prompts(parse_sources(data_args.eval_data or data_args.train_data, "eval_data"))
        finish(
            trainer,
            plan,
            manifest,
            metrics=metrics | {"expected_seconds": progress.expected_seconds},
            configuration=non_default_arguments(model_args, data_args, training_args) | {"objective": OBJECTIVE},
            parent=parent_of(model_args.model_name_or_path),
            samples=compare_replies(prompts, before, after, tokenizer),
            example=prompts[0],
        )
        say(f"\n{Path(training_args.output_dir, 'samples.md').read_text(encoding='utf-8')}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
