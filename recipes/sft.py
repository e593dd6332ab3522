"""Supervised fine-tuning on conversations, with all weights or an adapter.

    python recipes/sft.py --config recipes/configs/smollm2-135m/sft_lora.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/sft.py --config recipes/configs/llama-1b/sft.yaml

The targets are the tokens of the assistant's turns, with the token that ends a turn. The same command again resumes an
interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from transformers import set_seed

from unlabeled.config import FineTuningArguments, SFTArguments, SourceArguments, parse_arguments
from unlabeled.data import load_conversation_dataset
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.models.attention import needs_flat_batches
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.models.tuning import load_initial_model, load_model_for_tuning
from unlabeled.reporting.samples import compare_replies, first_prompts
from unlabeled.runtime.processes import print_on_main
from unlabeled.training import Samples
from unlabeled.training.sft import ExactSFTTrainer


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, training_args = parse_arguments(FineTuningArguments, SourceArguments, SFTArguments)
    set_seed(training_args.seed)

    # Tokenizer and chat template
    tokenizer = load_tokenizer(model_args.model_name_or_path, "model_name_or_path")
    print_on_main(ensure_pad_token(tokenizer))
    new_tokens = set_chat_template(tokenizer, model_args.chat_template)

    # Data set: conversations, rendered by the chat template, tokenized and packed once
    dataset = load_conversation_dataset(data_args, training_args, tokenizer)

    # Model: float32 weights (4 bits with qlora), with the adapter that the arguments ask for
    model = load_model_for_tuning(model_args, tokenizer, training_args, new_tokens)

    # Data collator: prompts and padding are no targets; conversations of a row do not see each other
    data_collator = DataCollatorForPackedLanguageModeling(
        tokenizer, mlm=False, max_length=training_args.max_length, flat=needs_flat_batches(model.config)
    )

    # Trainer
    trainer = ExactSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=data_collator,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="sft",
        manifest=dataset.manifest,
        arguments=(model_args, data_args),
    )
    trainer.train()
    trainer.evaluate()

    # Export: the model, metrics, samples and model card. Prompts of your own can be added here.
    prompts = first_prompts(parse_sources(data_args.eval_data or data_args.train_data, "eval_data"))

    def samples(saved) -> Samples:
        initial = load_initial_model(model_args, tokenizer, training_args.max_length)
        return Samples(compare_replies(prompts, initial, saved, tokenizer), example=prompts[0])

    trainer.export(samples=samples)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
