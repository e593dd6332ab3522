"""Spearman's and Pearson's correlation and the mean squared error of predicted numbers, by scipy and scikit-learn."""

import math

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error


class Regression(evaluate.Metric):
    """`compute(predictions=..., references=...)` of floats; a correlation with a constant, which is undefined, is 0."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": number, "references": number})
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        constant = len(set(predictions)) < 2 or len(set(references)) < 2
        found = {"spearmanr": 0.0, "pearsonr": 0.0}
        if not constant:
            found = {f.__name__: float(f(predictions, references).statistic) for f in (spearmanr, pearsonr)}
        found = {name: 0.0 if math.isnan(value) else value for name, value in found.items()}
        return found | {"mse": float(mean_squared_error(references, predictions))}
