"""Direct preference optimization (Rafailov et al. 2023) on pairs of answers, with all weights or an adapter.

    python recipes/dpo.py --config recipes/configs/smollm2-135m/dpo_lora.yaml
    accelerate launch --config_file ds_configs/zero2.yaml recipes/dpo.py --config recipes/configs/llama-1b/dpo.yaml

The reference is the model that the run starts from. The same command again resumes an interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from transformers import set_seed

from unlabeled.config import DPOArguments, FineTuningArguments, SourceArguments, parse_arguments
from unlabeled.data import load_preference_dataset
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.models.tuning import load_initial_model, load_model_for_tuning, load_reference_model
from unlabeled.reporting.samples import compare_replies, first_prompts
from unlabeled.runtime.processes import print_on_main
from unlabeled.training import Samples
from unlabeled.training.dpo import ExactDPOTrainer


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, training_args = parse_arguments(FineTuningArguments, SourceArguments, DPOArguments)
    set_seed(training_args.seed)

    # Tokenizer and chat template
    tokenizer = load_tokenizer(model_args.model_name_or_path, "model_name_or_path")
    print_on_main(ensure_pad_token(tokenizer))
    new_tokens = set_chat_template(tokenizer, model_args.chat_template)

    # Data set: pairs of answers that fit into `max_length`, tokenized
    dataset = load_preference_dataset(data_args, training_args, tokenizer)

    # Model: float32 weights (4 bits with qlora), with the adapter that the arguments ask for
    model = load_model_for_tuning(model_args, tokenizer, training_args, new_tokens)

    # Reference: None where it is the model without its adapter, or its log-probabilities are computed in advance
    reference = load_reference_model(model_args, tokenizer, training_args)

    # Trainer. TRL's data collator pads the pairs of a batch.
    trainer = ExactDPOTrainer(
        model=model,
        ref_model=reference,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="dpo",
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
