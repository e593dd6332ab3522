"""Causal language modeling: next-token prediction (GPT style), from scratch or continued.

    python recipes/pretrain_clm.py --config recipes/configs/tiny/pretrain_clm.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/pretrain_clm.py \\
        --config recipes/configs/llama-1b/pretrain_clm.yaml

Every key of the YAML file is also a command-line option. The same command again resumes an interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from transformers import AutoModelForCausalLM, set_seed

from unlabeled.config import DataArguments, FIMArguments, ModelArguments, PretrainingArguments, parse_arguments
from unlabeled.data import load_text_dataset
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.fim import add_fim_tokens
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.models.attention import needs_flat_batches
from unlabeled.models.loading import load_or_init_model
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.reporting.pretraining_samples import first_words, sample_continuations
from unlabeled.runtime.processes import print_on_main
from unlabeled.training import ExactTrainer, Samples


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, fim_args, training_args = parse_arguments(
        ModelArguments, DataArguments, FIMArguments, PretrainingArguments
    )
    set_seed(training_args.seed)

    # Tokenizer
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    print_on_main(ensure_pad_token(tokenizer))
    print_on_main(add_fim_tokens(tokenizer, fim_args.fim_rate))

    # Data set: tokenized and packed once, or while the model trains (`stream`)
    dataset = load_text_dataset(data_args, training_args, tokenizer, objective="clm", fim_rate=fim_args.fim_rate)

    # Model: float32 weights, from scratch or from a checkpoint
    model = load_or_init_model(AutoModelForCausalLM, model_args, tokenizer, training_args)

    # Data collator: labels equal the inputs, as the model shifts them; documents of a row do not see each other
    data_collator = DataCollatorForPackedLanguageModeling(
        tokenizer,
        mlm=False,
        max_length=training_args.max_length,
        isolate_documents=data_args.isolate_documents,
        flat=needs_flat_batches(model.config),
    )

    # Trainer. The loss is the mean over the target tokens of the whole batch, over all processes; the logits are
    # computed for some positions at a time.
    trainer = ExactTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=data_collator,
        processing_class=tokenizer,
        compute_loss_func=ChunkedLinearCrossEntropy(model, shift=True),
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="clm",
        manifest=dataset.manifest,
        arguments=(model_args, data_args, fim_args),
    )
    trainer.train()
    trainer.evaluate()

    # Export: the model, metrics, samples and model card. Prompts of your own can be added here.
    prompts = first_words(tokenizer, dataset["validation"])
    trainer.export(
        samples=lambda saved: Samples(sample_continuations(saved, tokenizer, prompts), example=prompts[0]),
    )
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
