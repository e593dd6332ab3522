"""Next-token prediction (GPT style), from scratch or continued.

    python recipes/pretrain_clm.py --config recipes/configs/tiny/pretrain_clm.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/pretrain_clm.py \\
        --config recipes/configs/llama-1b/pretrain_clm.yaml

Every key of the YAML is an option of the command line too. The same command again resumes where it stopped.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, set_seed

from unlabeled import exit_on_user_error
from unlabeled.config import DataArguments, FIMArguments, ModelArguments, PretrainingArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.fim import add_fim_tokens
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.rows import TrainingRows
from unlabeled.data.sources import parse_sources
from unlabeled.data.streams import StreamedRows
from unlabeled.data.summary import describe_dataset
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push
from unlabeled.models.attention import check_isolation, takes_lengths
from unlabeled.models.loading import fit_to_tokenizer, from_scratch, load_pretrained, reload, scratch_config
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import BuildOptimizer
from unlabeled.reporting.lineage import non_default_arguments, parent_of
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.training import ExactTrainer, finish
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "clm"


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, fim_args, training_args = parse_arguments(
        ModelArguments, DataArguments, FIMArguments, PretrainingArguments
    )
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Data: text is tokenised and packed once, then found again by its fingerprint -------------------------------
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    if added := ensure_pad_token(tokenizer):
        say(added)
    if added := add_fim_tokens(tokenizer, fim_args.fim_rate):
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
            fim_rate=fim_args.fim_rate,
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
        model = load_pretrained(AutoModelForCausalLM, model_args.model_name_or_path, model_args.attn_implementation)
        fit_to_tokenizer(model, tokenizer, training_args.max_length)
    else:
        config = scratch_config(model_args.model_type, model_args.config_overrides, tokenizer, training_args.max_length)
        model = from_scratch(AutoModelForCausalLM, config, model_args.attn_implementation)
    model.config.use_cache = False  # a cache would switch off the isolation by position_ids; exported as true
    model.to(training_args.device)  # where Trainer puts it, so that what is tried out below is tried there

    # --- Collator: labels equal the inputs, the model shifts; documents of a row do not see each other --------------
    collator = DataCollatorForPackedLanguageModeling(
        tokenizer,
        mlm=False,
        max_length=training_args.max_length,
        isolate_documents=data_args.isolate_documents,
        flat=takes_lengths(model.config),
    )

    # --- Loss: the output head is computed where there is a target, a few positions at a time -----------------------
    loss = ChunkedLinearCrossEntropy(model, shift=True)

    # --- Plan -------------------------------------------------------------------------------------------------------
    isolation = check_isolation(model, collator)
    estimate = estimate_run(model, training_args, manifest, loss.head_share)
    resolve_compile(training_args, estimate.costs.flops)
    plan = make_run_plan(model, training_args, manifest, estimate, isolation, model_args.model_name_or_path)
    identity = run_identity(
        manifest, tokenizer, model_args, training_args, isolate_documents=data_args.isolate_documents
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
    )
    progress = add_token_progress(trainer, plan)

    # --- Train, or resume from the newest complete checkpoint -------------------------------------------------------
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())

    # --- Evaluate, save, and leave everything that a reader of the folder needs -------------------------------------
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        model = reload(AutoModelForCausalLM, training_args.output_dir, trainer.model)
        places = [len(rows["validation"]) * quarter // 4 for quarter in (1, 2, 3)]
        prompts = [openings(tokenizer, row) for row in rows["validation"].select(places)]
        finish(
            trainer,
            plan,
            manifest,
            metrics=metrics | {"expected_seconds": progress.expected_seconds},
            configuration=non_default_arguments(model_args, data_args, fim_args, training_args)
            | {"objective": OBJECTIVE},
            parent=parent_of(model_args.model_name_or_path),
            samples=continuations(model, tokenizer, prompts),
            example=prompts[0],
        )
        say(f"\n{Path(training_args.output_dir, 'samples.md').read_text(encoding='utf-8')}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


def openings(tokenizer, row: dict) -> str:
    """The first words of a held-out row, as a prompt."""
    return tokenizer.decode(row["input_ids"][:24], skip_special_tokens=True)


def continuations(model, tokenizer, prompts: list[str]) -> str:
    """Markdown: what the model makes of each prompt."""
    lines = ["Each prompt is held-out text; the continuation is sampled at temperature 0.8, top-p 0.95.", ""]
    for prompt in prompts:
        bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        start = [bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        room = getattr(model.config, "max_position_embeddings", 1024) - len(start)
        output = model.generate(
            torch.tensor([start]), max_new_tokens=max(min(100, room), 1), do_sample=True, temperature=0.8, top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        continuation = tokenizer.decode(output[0, len(start) :], skip_special_tokens=True)
        lines += ["```text", f"{prompt}|{continuation}", "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
