"""The pictures of a chain's report: where curves, ticks and labels go; the template draws them as SVG.

A part of `python scripts/make_report.py`, without a command of its own. Drawn by hand and not by matplotlib, so that
the colours follow the page's light or dark, the text stays text, and a phone gets a picture of its own shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unlabeled import planning as budget

if TYPE_CHECKING:
    from make_report import Stage

RELATIVE = ("dpo", "reward", "grpo")  # their loss compares two answers, and is not one of tokens
POINTS = 200  # of a curve: more than the picture can show
# Of the small pictures: title, unit, and what is logged in training (by TRL) and held out (by unlabeled.training).
PREFERENCES = (
    ("Preference loss", "nats per pair", "loss", "eval_loss"),
    ("Reward accuracy", "pairs ranked right", "rewards/accuracies", "reward_accuracy"),
)


def number(values: dict, key: str, default: float | None = None) -> float | None:
    """A finite number, or the default: figures that are missing or broken are left out, never guessed."""
    value = values.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else default


def human(n: float) -> str:
    """A count with three significant digits: 950, 12.3K, 124M, 6.74B, 1.2T, and 1.21 × 10²⁰ from a quadrillion on."""
    digits, _, exponent = budget.format_count(n).partition("e")
    return digits + (f" × 10{exponent.translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}" if exponent else "")


def total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def shares(values: list[float | None]) -> list[float | None]:
    """Each value's part of their sum; they add up to 1. None where there is no value, or nothing to divide."""
    whole = total(values)
    return [value / whole if whole and value is not None else None for value in values]


@dataclass
class Curve:
    """A quantity of a stage in training and held out, as (tokens since the chain began, value)."""

    stage: Stage
    train: list[tuple[float, float]]
    held: list[tuple[float, float]]

    @property
    def span(self) -> tuple[float, float]:
        ends = [x for x, _ in self.train + self.held]
        return self.stage.start, max([self.stage.start + (self.stage.tokens or 0), *ends])


def curve(stage: Stage, train: str, held: str) -> Curve:
    def points(key: str) -> list[tuple[float, float]]:
        pairs = ((number(entry, "tokens"), number(entry, key)) for entry in stage.history)
        return sorted((stage.start + tokens, value) for tokens, value in pairs if None not in (tokens, value))

    found = points(held)
    before = number(stage.metrics, f"{held}_before")
    if before is not None and (not found or found[0][0] > stage.start):
        found.insert(0, (stage.start, before))
    return Curve(stage, thin(points(train)), found)


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over neighbours, so that a long run's curve stays small and calm."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between low and high, `most` or fewer."""
    rough = (high - low) / most
    step = next(size for size in (m * 10 ** math.floor(math.log10(rough)) for m in (1, 2, 5, 10)) if size >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, unit: str, curves: list[Curve], width: int, height: int, css: str = "") -> dict:
    """Where everything of a picture goes, in pixels. A stage gets its share of the width, and at least a sixth."""
    spans = [curve.span for curve in curves]
    left, right, bottom = 40, width - 14, height - 26
    parts = [max(part or 0, 1 / 6) for part in shares([end - start for start, end in spans])]
    starts, widths = [left], [(right - left) * part / sum(parts) for part in parts]
    for size in widths:
        starts.append(starts[-1] + size)
    names, ends = [], []  # rows of names above the curves: each takes the first row in which it has room
    for curve, start in zip(curves, starts, strict=False):
        text = curve.stage.name if len(curve.stage.name) <= 24 else curve.stage.name[:23] + "…"
        length = 7.5 * len(text)
        x = max(min(start + 6, right - length), 0)
        row = next((i for i, end in enumerate(ends) if end < x), len(ends))
        ends[row : row + 1] = [x + length + 8]
        names.append((x, 14 + 16 * row, text, curve.stage.hue))
    top = 24 + 16 * len(ends)
    values = [y for curve in curves for _, y in curve.train + curve.held]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1
    low, high = low - pad, high + pad
    levels = ticks(low, high, max(4, (bottom - top) // 48))
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9)) if len(levels) > 1 else 2

    def place(i: int, point: tuple[float, float]) -> tuple[float, float]:
        (start, end), (x, y) = spans[i], point
        across = (x - start) / (end - start) if end > start else 0.5
        return round(starts[i] + across * widths[i], 1), round(bottom - (y - low) / (high - low) * (bottom - top), 1)

    marks = [(left, human(spans[0][0]), "start")]
    for i, (start, end) in enumerate(spans):
        inner = (
            [(place(i, (x, low))[0], x) for x in ticks(start, end, max(1, int(widths[i] / 80)))] if end > start else []
        )
        marks += [(x, human(value), "middle") for x, value in inner if starts[i] + 40 < x < starts[i + 1] - 50]
        marks.append((round(starts[i + 1], 1), human(end), "middle" if i + 1 < len(spans) else "end"))
    drawn = []
    for i, curve in enumerate(curves):
        train, held = ([place(i, point) for point in points] for points in (curve.train, curve.held))
        last = (curve.held or curve.train)[-1:]
        value = [(*place(i, point), f"{point[1]:.{digits + 2}f}") for point in last]
        drawn.append({"hue": curve.stage.hue, "train": train, "held": held, "value": value})
    return {
        "title": title, "unit": unit, "width": width, "height": height, "left": left, "right": right, "top": top,
        "bottom": bottom, "css": css, "names": names, "edges": starts[1:-1], "marks": marks, "curves": drawn,
        "levels": [(place(0, (spans[0][0], level))[1], f"{level:.{digits}f}") for level in levels],
        "words": "; ".join(map(told, curves)), "stretched": min(parts) > 0 and sum(parts) > 1.0001,
    }  # fmt: skip


def told(curve: Curve) -> str:
    """A curve in words, for those who hear the page."""
    kinds = [(what, points) for what, points in (("training", curve.train), ("held out", curve.held)) if points]
    return f"{curve.stage.name}: " + ", ".join(
        f"{what} from {points[0][1]:.3f} to {points[-1][1]:.3f}" if len(points) > 1 else f"{what} {points[0][1]:.3f}"
        for what, points in kinds
    )


def charts(stages: list[Stage]) -> dict:
    """The picture of all losses of tokens, and small ones of what preference tuning follows."""

    def curves(relative: bool, train: str, held: str) -> list[Curve]:
        found = [
            curve(stage, train, held) for stage in stages if stage.trained and (stage.kind in RELATIVE) == relative
        ]
        return [curve for curve in found if curve.train or curve.held]

    wanted = [(title, unit, curves(True, train, held)) for title, unit, train, held in PREFERENCES]
    side = [chart(title, unit, found, 350, 206) for title, unit, found in wanted if found]
    losses = curves(False, "loss", "eval_loss")
    shapes = [(720 if side else 1080, 440, "wide-only"), (350, 320, "narrow")]
    return {
        "main": [chart("Loss", "nats per target token", losses, *shape) for shape in shapes if losses],
        "side": side,
    }
