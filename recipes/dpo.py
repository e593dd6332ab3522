"""Preference tuning (Rafailov et al. 2023) on pairs of a better and a worse answer, all weights or an adapter.

    python recipes/dpo.py --config recipes/configs/smollm2-135m/dpo_lora.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/dpo.py --config recipes/configs/llama-1b/dpo.yaml

The reference is the model that the run starts from. The same command again resumes where it stopped.
"""

from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOTrainer

from unlabeled import UserError, exit_on_user_error
from unlabeled.config import DPOArguments, FineTuningArguments, SourceArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.chat_templates import set_chat_template, stop_at_end_of_turn
from unlabeled.data.preferences import prepare_pairs
from unlabeled.data.rows import training_order
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer, vocabulary_size
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push, check_push_of_own_base
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
from unlabeled.training import PreferenceMixin, finish
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "dpo"


class ExactDPOTrainer(PreferenceMixin, DPOTrainer):
    """TRL's trainer with exact evaluation and resume."""


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, training_args = parse_arguments(FineTuningArguments, SourceArguments, DPOArguments)
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Data: pairs that fit, in the order of the whole run --------------------------------------------------------
    tokenizer = load_tokenizer(model_args.model_name_or_path, "model_name_or_path")
    if added := ensure_pad_token(tokenizer):
        say(added)
    new_tokens = set_chat_template(tokenizer, model_args.chat_template)
    pairs, manifest = prepare_pairs(
        train=parse_sources(data_args.train_data, "train_data"),
        evaluation=parse_sources(data_args.eval_data or [], "eval_data"),
        tokenizer=tokenizer,
        max_length=training_args.max_length,
        eval_fraction=data_args.eval_fraction,
    )
    total = training_args.max_steps * training_args.rows_per_step
    order = training_order(len(pairs["train"]), total, training_args.seed)
    training_args.set_token_counts(pairs["train"].select(order)["tokens"][:])
    for split, counts in manifest["splits"].items():
        say(f"{split:<11}{counts['documents']:>9,} pairs")

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

    # --- Reference: with an adapter it is the same model, as it was; all weights need a second one ------------------
    reference = None
    if model_args.adapter == "none" and not training_args.precompute_ref_log_probs:
        reference = load_for_tuning(model_args, quiet=True).requires_grad_(False)
        fit_to_tokenizer(reference, tokenizer, training_args.max_length)

    # --- Plan -------------------------------------------------------------------------------------------------------
    estimate = estimate_run(model, training_args, manifest)
    resolve_compile(training_args, estimate.costs.flops)
    plan = make_run_plan(model, training_args, manifest, estimate, "one answer in a row", model_args.model_name_or_path)
    identity = run_identity(manifest, tokenizer, model_args, training_args)
    with training_args.main_process_first(local=False) as is_first:
        if acquire_output_dir(training_args.output_dir, identity, plan["disk_bytes"], is_first):
            return report_finished_run(training_args)
    if training_args.process_index == 0:
        print_run_plan(plan)

    # --- Trainer ----------------------------------------------------------------------------------------------------
    trainer = ExactDPOTrainer(
        model=model,
        ref_model=reference,
        args=training_args,
        train_dataset=pairs["train"].select(order),
        eval_dataset=pairs["validation"],
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
