"""The registry of stages: what each kind of stage is called, which file runs it, and which metrics it is about.

Chains, lineages, model cards, reports and plots read it. A recipe that trains something new gets an entry here.
"""

from dataclasses import dataclass

DEFAULT_LOSS_UNIT = "nats per target token"


@dataclass(frozen=True)
class StageKind:
    """A kind of stage.

    Attributes:
        name: as chains and `lineage.json` have it.
        file: the recipe or script that runs it, from the root of the repository.
        description: a noun phrase for the model card and the report.
        objective: the `objective` of the trainer; None if nothing is trained.
        unit: the unit of the training budget, as in `train_tokens`; None if nothing is trained.
        loss_unit: what the loss is measured in.
        headline: the metrics that summarize the stage, the most important one first. Those that a run has are shown.
        pipeline_tag: the task of the model on the Hub; None for a stage that writes no model.
    """

    name: str
    file: str
    description: str
    objective: str | None = None
    unit: str | None = None
    loss_unit: str = DEFAULT_LOSS_UNIT
    headline: tuple[str, ...] = ()
    pipeline_tag: str | None = None


STAGE_KINDS: dict[str, StageKind] = {
    kind.name: kind
    for kind in (
        StageKind("tokenizer", "scripts/train_tokenizer.py", "training a tokenizer"),
        StageKind("prepare", "scripts/prepare_data.py", "packing the text"),
        StageKind(
            name="pretrain_clm",
            file="recipes/pretrain_clm.py",
            description="next-token prediction",
            objective="clm",
            unit="tokens",
            headline=("bits_per_byte", "eval_loss", "perplexity"),
            pipeline_tag="text-generation",
        ),
        StageKind(
            name="pretrain_mlm",
            file="recipes/pretrain_mlm.py",
            description="masked-token prediction",
            objective="mlm",
            unit="tokens",
            headline=("eval_loss", "bits_per_byte", "perplexity"),
            pipeline_tag="fill-mask",
        ),
        StageKind(
            name="pretrain_span",
            file="recipes/pretrain_span.py",
            description="span corruption",
            objective="span",
            unit="tokens",
            headline=("eval_loss", "restored_spans", "perplexity"),
            pipeline_tag="text2text-generation",
        ),
        StageKind(
            name="sft",
            file="recipes/sft.py",
            description="supervised fine-tuning",
            objective="sft",
            unit="tokens",
            headline=("eval_loss", "bits_per_byte", "perplexity"),
            pipeline_tag="text-generation",
        ),
        StageKind(
            name="dpo",
            file="recipes/dpo.py",
            description="direct preference optimization",
            objective="dpo",
            unit="pairs",
            loss_unit="nats per pair",
            headline=("preference_accuracy", "reward_accuracy", "reward_margin"),
            pipeline_tag="text-generation",
        ),
        StageKind(
            name="classify",
            file="recipes/classify.py",
            description="fine-tuning for text classification",
            objective="classify",
            unit="examples",
            loss_unit="nats per text",
            headline=("test_accuracy", "eval_accuracy", "test_spearmanr", "eval_spearmanr"),
            pipeline_tag="text-classification",
        ),
        StageKind(
            name="tag",
            file="recipes/tag.py",
            description="fine-tuning for token classification",
            objective="tag",
            unit="examples",
            loss_unit="nats per word",
            headline=("test_f1", "eval_f1"),
            pipeline_tag="token-classification",
        ),
        StageKind(
            name="embed",
            file="recipes/embed.py",
            description="contrastive fine-tuning on sentence pairs",
            objective="embed",
            unit="pairs",
            loss_unit="nats per pair",
            headline=("accuracy_at_1", "mrr", "spearmanr"),
            pipeline_tag="sentence-similarity",
        ),
        StageKind(
            name="merge",
            file="scripts/merge_adapter.py",
            description="merging the adapter into the model",
            headline=("logits_difference",),
            pipeline_tag="text-generation",
        ),
        StageKind(
            name="evaluate",
            file="scripts/evaluate_model.py",
            description="evaluation",
            headline=("bits_per_byte", "eval_loss", "perplexity"),
        ),
        StageKind("push", "scripts/push_to_hub.py", "a push to the Hub"),
    )
}


def stage_of_objective(objective: str) -> str:
    """The name of the stage that trains an objective; an objective without a stage is its own name."""
    for kind in STAGE_KINDS.values():
        if kind.objective == objective:
            return kind.name
    return objective
