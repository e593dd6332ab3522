"""Masked language modeling (BERT style, the Cloze task), from scratch or continued.

    python recipes/pretrain_mlm.py --config recipes/configs/tiny/pretrain_mlm.yaml
    accelerate launch --config_file ds_configs/ddp.yaml recipes/pretrain_mlm.py \\
        --config recipes/configs/modernbert-base/pretrain_mlm.yaml

Every key of the YAML file is also a command-line option. The same command again resumes an interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from transformers import AutoModelForMaskedLM, set_seed

from unlabeled.config import DataArguments, MaskingArguments, ModelArguments, PretrainingArguments, parse_arguments
from unlabeled.data import load_text_dataset
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.randomness import EVALUATION_SEED
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.models.attention import needs_flat_batches, sliding_window
from unlabeled.models.loading import load_or_init_model
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.reporting.pretraining_samples import fill_sample_masks, first_words, mask_words
from unlabeled.runtime.processes import print_on_main
from unlabeled.training import ExactTrainer, Samples

EVALUATION_RATE = 0.15  # of the tokens are masked in the evaluation, whatever rate a run trains at


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, masking_args, training_args = parse_arguments(
        ModelArguments, DataArguments, MaskingArguments, PretrainingArguments
    )
    set_seed(training_args.seed)

    # Tokenizer
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    print_on_main(ensure_pad_token(tokenizer))

    # Data set: tokenized and packed once, or while the model trains (`stream`)
    dataset = load_text_dataset(data_args, training_args, tokenizer, objective="mlm")

    # Model: float32 weights, from scratch or from a checkpoint
    model = load_or_init_model(AutoModelForMaskedLM, model_args, tokenizer, training_args)

    # Data collators: the masks of a row follow from (seed, epoch, row); the evaluation has fixed masks
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
            flat=needs_flat_batches(model.config),
        )

    # Trainer. The loss is the mean over the masked tokens of the whole batch, over all processes; the logits are
    # computed at masked positions only, some at a time.
    trainer = ExactTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=masking(training_args.seed, masking_args.mlm_probability),
        eval_collator=masking(EVALUATION_SEED, EVALUATION_RATE),
        processing_class=tokenizer,
        compute_loss_func=ChunkedLinearCrossEntropy(model, shift=False, target_share=masking_args.mlm_probability),
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="mlm",
        manifest=dataset.manifest,
        arguments=(model_args, data_args, masking_args),
    )
    trainer.train()
    trainer.evaluate()
    at_training_rate = trainer.token_sums(masking(EVALUATION_SEED, masking_args.mlm_probability))

    # Export: the model, metrics, samples and model card. Sentences of your own can be added here.
    sentences = first_words(tokenizer, dataset["validation"], tokens=48)
    example, _ = mask_words(tokenizer, sentences[0])
    trainer.export(
        samples=lambda saved: Samples(fill_sample_masks(saved, tokenizer, sentences), example=example),
        metrics={"eval_loss_at_training_rate": at_training_rate.loss, "mlm_probability": masking_args.mlm_probability},
    )
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
