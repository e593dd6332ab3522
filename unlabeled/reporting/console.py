"""The result of a run in one line."""

from unlabeled.reporting.lineage import shown


def summary(objective: str, metrics: dict) -> str:
    """What a run has reached, in one line: the figures that it has."""
    aside, parts = f"unigram entropy {metrics.get('unigram_entropy', 0):.4f}" * ("unigram_entropy" in metrics), []
    for name, value, was in shown(objective, {k: v for k, v in metrics.items() if k != "unigram_entropy"}):
        loss = name.startswith("loss (")
        before, name = f"before {was}" if was else aside * loss, "held-out loss" if loss else name
        said = f"{value} {name}" if name == "bits per byte" else f"{name} {value}"
        parts.append(said + (f" ({before})" if before else ""))
    return ", ".join(parts)
