"""Token classification, such as named-entity recognition: words with a tag each.

    python recipes/tag.py --config recipes/configs/minilm/tag.yaml
    torchrun --nproc_per_node 2 recipes/tag.py --config recipes/configs/minilm/tag.yaml

The prediction for a word is that for its first token. The same command again resumes an interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from transformers import AutoModelForTokenClassification, set_seed

from unlabeled.config import AdapterArguments, DownstreamArguments, TaskArguments, parse_arguments
from unlabeled.data import load_labeled_dataset
from unlabeled.data.collators import DataCollatorForClassification
from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
from unlabeled.models.classification import load_classifier, reads_type_ids
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.runtime.processes import print_on_main
from unlabeled.training.classification import ExactClassificationTrainer, label_loss


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, training_args = parse_arguments(AdapterArguments, TaskArguments, DownstreamArguments)
    set_seed(training_args.seed)

    # Tokenizer. `split_special_tokens` is saved with it, so that a pipeline reads the name of a special token as text.
    tokenizer = load_tokenizer(model_args.model_name_or_path, "model_name_or_path", split_special_tokens=True)
    print_on_main(ensure_pad_token(tokenizer))

    # Data set: words with a tag each, tokenized, rows of similar length in a batch
    dataset = load_labeled_dataset(data_args, training_args, tokenizer, words=True)

    # Model: float32 weights, with a new head for the labels where the checkpoint has none
    model, heads = load_classifier(
        AutoModelForTokenClassification, model_args, training_args, tokenizer, dataset.task, data_args.is_causal
    )

    # Data collator: pads to the longest row of the batch
    data_collator = DataCollatorForClassification(
        tokenizer.pad_token_id, training_args.max_length, reads_type_ids(model)
    )

    # Trainer. The loss is the mean over the tagged words of the whole batch, over all processes.
    trainer = ExactClassificationTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=data_collator,
        processing_class=tokenizer,
        compute_loss_func=label_loss,
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="tag",
        manifest=dataset.manifest,
        arguments=(model_args, data_args),
        task=dataset.task,
        heads=heads,
        labeled=dataset.labeled,
        is_causal=data_args.is_causal,
    )
    trainer.train()
    trainer.evaluate()

    # Export: the model, metrics, a report on the labels, and the model card
    trainer.export(samples=lambda saved: trainer.report())
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
