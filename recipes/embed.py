"""Sentence embeddings from any model: texts that belong together come to lie together (contrastive, on pairs).

    python recipes/embed.py --config recipes/configs/minilm/embed.yaml
    torchrun --nproc_per_node 2 recipes/embed.py --config recipes/configs/minilm/embed.yaml

Each anchor has to find its positive among all positives of the batch (InfoNCE; van den Oord et al. 2018), so a batch is
one softmax over all processes and never accumulated. The same command again resumes.
"""

from pathlib import Path

import numpy as np
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import set_seed

from unlabeled import UserError, exit_on_user_error
from unlabeled.config import AdapterArguments, EmbedArguments, SourceArguments, parse_arguments
from unlabeled.config.compilation import resolve_compile
from unlabeled.data.pairs import left_out_of_epoch, order_of_pairs, read_pairs, text_columns
from unlabeled.data.tokenization import ensure_pad_token
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push
from unlabeled.models.loading import fit_to_tokenizer
from unlabeled.models.optimizers import BuildOptimizer
from unlabeled.reporting.lineage import non_default_arguments, parent_of
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.output_dir import acquire_output_dir
from unlabeled.training import finish
from unlabeled.training.embedding import (
    SCALE,
    ExactEmbeddingMixin,
    add_adapter,
    check_saved,
    describe_batch,
    freeze_unused,
    load_embedder,
    neighbours,
)
from unlabeled.training.progress import add_token_progress
from unlabeled.training.run_identity import run_identity

OBJECTIVE = "embed"


class ExactEmbedTrainer(ExactEmbeddingMixin, SentenceTransformerTrainer):
    """The trainer of sentence-transformers with exact order, evaluation and resume."""


def main():
    # --- Arguments: one YAML is the whole run -----------------------------------------------------------------------
    model_args, data_args, training_args = parse_arguments(AdapterArguments, SourceArguments, EmbedArguments)
    check_push(training_args)
    say = print if training_args.process_index == 0 else lambda *values: None
    set_seed(training_args.seed)

    # --- Model: a backbone and its pooling; what embeddings do not depend on is frozen ------------------------------
    model = load_embedder(model_args, training_args)
    if added := ensure_pad_token(model.tokenizer):
        say(added)
    grown = fit_to_tokenizer(model.transformers_model, model.tokenizer, training_args.max_length)
    if grown and model_args.adapter != "none":
        raise UserError(
            f"the tokenizer of {model_args.model_name_or_path} has ids that its model has no vectors for, as for a new "
            "pad token, and an adapter cannot add them; set adapter: none"
        )
    if model_args.adapter != "none":
        adapter = LoraConfig(
            task_type="FEATURE_EXTRACTION",
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=model_args.lora_target_modules,
            use_rslora=model_args.adapter == "rslora",
            use_dora=model_args.adapter == "dora",
        )
        add_adapter(model, adapter)
    freeze_unused(model)

    # --- Data: whole batches of each epoch, so that no text is twice in one -----------------------------------------
    pairs, manifest = read_pairs(data_args, model.tokenizer, training_args.max_length)
    columns = text_columns(pairs["train"])
    repeats = None  # without hard negatives no text is in two rows
    if len(columns) > 2:
        repeats = list(zip(*(pairs["train"][name][:] for name in columns), strict=True))
        manifest["splits"]["train"]["uneven_epochs"] = True
        crowded = left_out_of_epoch(len(repeats), training_args, repeats)
        if crowded:
            say(f"{crowded:,} pairs of an epoch are in no batch, as each of their batches would have a text twice")
    order = order_of_pairs(len(pairs["train"]), training_args, repeats)
    tokens = np.array(pairs["train"]["tokens"][:])[order]
    training_args.train_tokens, training_args.batch_tokens = int(tokens.sum()), tokens.sum() / training_args.max_steps
    for split, counts in manifest["splits"].items():
        say(
            f"{split:<11}{counts['documents']:>9,} pairs, "
            f"{counts['truncated']:,} texts cut to {training_args.max_length} tokens"
        )

    # --- Plan -------------------------------------------------------------------------------------------------------
    backbone, isolation = model.transformers_model, "one text in a row"
    estimate = estimate_run(backbone, training_args, manifest)
    resolve_compile(training_args, estimate.costs.flops)
    plan = make_run_plan(backbone, training_args, manifest, estimate, isolation, model_args.model_name_or_path)
    plan["lines"]["batch"] = describe_batch(training_args, len(columns) - 2)
    identity = run_identity(manifest, model.tokenizer, model_args, training_args)
    with training_args.main_process_first(local=False) as is_first:
        if acquire_output_dir(training_args.output_dir, identity, plan["disk_bytes"], is_first):
            return report_finished_run(training_args)
    if training_args.process_index == 0:
        print_run_plan(plan)

    # --- Trainer ----------------------------------------------------------------------------------------------------
    trainer = ExactEmbedTrainer(
        model=model,
        args=training_args,
        train_dataset=pairs["train"].select(order).select_columns(columns),
        eval_dataset=pairs["validation"],
        loss=CachedMultipleNegativesRankingLoss(
            model,
            scale=SCALE,
            mini_batch_size=training_args.per_device_train_batch_size,
            gather_across_devices=training_args.world_size > 1,
        ),
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
        before = load_embedder(model_args, training_args)
        held_out = pairs["validation"]
        after = check_saved(training_args.output_dir, model, held_out["anchor"][:8], training_args)
        finish(
            trainer,
            plan,
            manifest,
            metrics=metrics | {"expected_seconds": progress.expected_seconds},
            configuration=non_default_arguments(model_args, data_args, training_args) | {"objective": OBJECTIVE},
            parent=parent_of(model_args.model_name_or_path),
            samples=neighbours(before, after, held_out, training_args),
            example=[held_out[0]["anchor"], held_out[0]["positive"]],
        )
        say(f"\n{Path(training_args.output_dir, 'samples.md').read_text(encoding='utf-8')}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
