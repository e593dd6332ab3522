"""Accuracy, macro F1 and Matthews correlation of predicted classes, by scikit-learn."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


class Classification(evaluate.Metric):
    """`compute(predictions=..., references=...)` of int class ids; macro F1 over the classes that occur in either."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": ids, "references": ids})
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
            "matthews_correlation": float(matthews_corrcoef(references, predictions)),
        }
