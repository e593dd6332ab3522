"""Span corruption (T5 style): spans of a text are removed, and an encoder-decoder restores them.

    python recipes/pretrain_span.py --config recipes/configs/tiny/pretrain_span.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/pretrain_span.py \\
        --config recipes/configs/t5-base/pretrain_span.yaml

Every key of the YAML file is also a command-line option. The same command again resumes an interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from transformers import AutoModelForSeq2SeqLM, set_seed

from unlabeled.config import DataArguments, ModelArguments, PretrainingArguments, SpanArguments, parse_arguments
from unlabeled.data import load_text_dataset
from unlabeled.data.collators import DataCollatorForSpanCorruption
from unlabeled.data.randomness import EVALUATION_SEED
from unlabeled.data.span_corruption import add_span_tokens
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.models.attention import separate_cross_attention_mask
from unlabeled.models.loading import load_or_init_model
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.reporting.pretraining_samples import restore_spans
from unlabeled.runtime.processes import print_on_main
from unlabeled.training import ExactTrainer, Samples


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, span_args, training_args = parse_arguments(
        ModelArguments, DataArguments, SpanArguments, PretrainingArguments
    )
    set_seed(training_args.seed)

    # Tokenizer
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    print_on_main(ensure_pad_token(tokenizer))
    print_on_main(add_span_tokens(tokenizer, span_args.mixture, training_args.max_length))

    # Data set: tokenized and packed once, or while the model trains (`stream`)
    dataset = load_text_dataset(data_args, training_args, tokenizer, objective="span", denoisers=span_args.mixture)

    # Model: float32 weights, from scratch or from a checkpoint
    model = load_or_init_model(AutoModelForSeq2SeqLM, model_args, tokenizer, training_args)
    model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)

    # Data collators: the spans of a row follow from (seed, epoch, row); the evaluation has fixed spans
    def span_corruption(seed: int) -> DataCollatorForSpanCorruption:
        return DataCollatorForSpanCorruption(
            tokenizer,
            denoisers=span_args.mixture,
            decoder_start_token_id=model.config.decoder_start_token_id,
            seed=seed,
            max_length=training_args.max_length,
            isolate_documents=data_args.isolate_documents,
        )

    eval_collator = span_corruption(EVALUATION_SEED)

    # Trainer. The loss is the mean over the target tokens of the whole batch, over all processes; the logits are
    # computed for some positions at a time.
    trainer = ExactTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=span_corruption(training_args.seed),
        eval_collator=eval_collator,
        processing_class=tokenizer,
        compute_loss_func=ChunkedLinearCrossEntropy(model, shift=False),
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="span",
        manifest=dataset.manifest,
        arguments=(model_args, data_args, span_args),
    )
    trainer.train()
    trainer.evaluate()

    # Export: the model, metrics, samples and model card
    def samples(saved) -> Samples:
        saved.to(training_args.device)
        markdown, metrics, example = restore_spans(saved, tokenizer, eval_collator, dataset["validation"])
        return Samples(markdown, example, metrics)

    trainer.export(samples=samples)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
