"""Sentence embeddings from any model, by contrastive learning on pairs of texts that belong together.

    python recipes/embed.py --config recipes/configs/minilm/embed.yaml
    torchrun --nproc_per_node 2 recipes/embed.py --config recipes/configs/minilm/embed.yaml

Each anchor has to find its positive among all positives of the batch (InfoNCE; van den Oord et al. 2018), so a batch is
one softmax over all processes and is never accumulated. The same command again resumes an interrupted run.
"""

from unlabeled import exit_on_user_error  # before the libraries, which read its settings when they are imported

# isort: split
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import set_seed

from unlabeled.config import AdapterArguments, SourceArguments, parse_arguments
from unlabeled.config.embedding import EmbedArguments
from unlabeled.data import load_pair_dataset
from unlabeled.models.embedding import load_embedder, load_embedder_for_training
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.training.embedding import SCALE, ExactSentenceTransformerTrainer, nearest_neighbours


def main():
    # Arguments: one YAML file is the whole run
    model_args, data_args, training_args = parse_arguments(AdapterArguments, SourceArguments, EmbedArguments)
    set_seed(training_args.seed)

    # Model: a transformer and its pooling, with the adapter that the arguments ask for; its tokenizer comes with it
    model = load_embedder_for_training(model_args, training_args)

    # Data set: whole batches of each epoch, in which no text is twice
    dataset = load_pair_dataset(data_args, training_args, model.tokenizer)

    # Trainer. The data collator of sentence-transformers tokenizes the texts; the loss embeds
    # `per_device_train_batch_size` of them at a time, and is that of the whole batch over all processes.
    trainer = ExactSentenceTransformerTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        loss=CachedMultipleNegativesRankingLoss(
            model,
            scale=SCALE,
            mini_batch_size=training_args.per_device_train_batch_size,
            gather_across_devices=training_args.world_size > 1,
        ),
        optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs),
        objective="embed",
        manifest=dataset.manifest,
        arguments=(model_args, data_args),
    )
    trainer.train()
    trainer.evaluate()

    # Export: the model, metrics, nearest neighbours before and after training, and the model card
    def samples(saved):
        initial = load_embedder(model_args, training_args)
        batch_size = training_args.per_device_eval_batch_size
        return nearest_neighbours(initial, saved, dataset["validation"], batch_size)

    trainer.export(samples=samples)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
