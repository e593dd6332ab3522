"""Precision, recall and F1 of whole entities, overall and of each kind, by seqeval."""

import datasets
import evaluate
from seqeval.metrics import classification_report


class Entities(evaluate.Metric):
    """`compute(predictions=..., references=...)` of sentences as lists of IOB2 tags; counts as conlleval does."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": tags, "references": tags})
        )

    def _compute(self, predictions, references) -> dict:
        """`precision`, `recall` and `f1` over all entities, and under `kinds` the same and `support` of each kind."""
        report = classification_report(references, predictions, output_dict=True, zero_division=0)
        keys = {"precision": "precision", "recall": "recall", "f1-score": "f1", "support": "support"}
        report = {kind: {keys[k]: float(v) for k, v in row.items()} for kind, row in report.items()}
        nothing = dict.fromkeys(keys.values(), 0.0)
        overall = report.get("micro avg", nothing)
        kinds = {kind: row for kind, row in report.items() if not kind.endswith(" avg")}
        return {key: overall[key] for key in ("precision", "recall", "f1")} | {"kinds": kinds}
