"""The charts of a chain's report: the positions of curves, ticks and labels, which the template draws as SVG.

Not drawn by matplotlib, so that the colors follow the page's light or dark theme, text stays text, and a narrow screen
gets a chart of another shape.
"""

import math
from dataclasses import dataclass

from unlabeled.planning import format_count
from unlabeled.reporting.chain_stages import ReportStage, number
from unlabeled.reporting.metrics import loss_unit
from unlabeled.reporting.stages import STAGE_KINDS

MAX_POINTS = 200  # of a curve: a chart cannot show more
MAX_NAME_LENGTH = 24
# Of the small charts of preference tuning: title, unit, and the keys of the history in training and in evaluation.
PREFERENCE_CHARTS = (
    ("Preference loss", "nats per pair", "loss", "eval_loss"),
    ("Reward accuracy", "share of pairs ranked correctly", "rewards/accuracies", "reward_accuracy"),
)
# Sizes in pixels.
LEFT_MARGIN = 40  # for the labels of the levels
RIGHT_MARGIN = 14
BOTTOM_MARGIN = 26  # for the labels of the ticks
TOP_MARGIN = 24
NAME_HEIGHT = 16  # of a row of stage names
CHARACTER_WIDTH = 7.5
LEVEL_DISTANCE = 48
TICK_DISTANCE = 80

Point = tuple[float, float]


@dataclass
class Curve:
    """A quantity of a stage in training and in evaluation, as points (tokens since the chain began, value)."""

    stage: ReportStage
    training: list[Point]
    evaluation: list[Point]

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last token of the stage."""
        last_points = [tokens for tokens, _ in self.training + self.evaluation]
        return self.stage.first_token, max(self.stage.first_token + (self.stage.tokens or 0), *last_points)


def make_curve(stage: ReportStage, training_key: str, evaluation_key: str) -> Curve:
    """The curve of two keys of a stage's history. The value before fine-tuning is its first evaluation."""
    evaluation = history_points(stage, evaluation_key)
    before = number(stage.metrics, f"{evaluation_key}_before")
    if before is not None and (not evaluation or evaluation[0][0] > stage.first_token):
        evaluation.insert(0, (stage.first_token, before))
    return Curve(stage, average_neighbours(history_points(stage, training_key)), evaluation)


def history_points(stage: ReportStage, key: str) -> list[Point]:
    points = []
    for entry in stage.history:
        tokens = number(entry, "tokens")
        value = number(entry, key)
        if tokens is not None and value is not None:
            points.append((stage.first_token + tokens, value))
    return sorted(points)


def average_neighbours(points: list[Point]) -> list[Point]:
    """Means over neighbouring points, so that at most `MAX_POINTS` remain."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round values between low and high."""
    smallest_step = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(smallest_step))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= smallest_step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_large_count(n: float) -> str:
    """A count with three significant digits: 950, 12.3K, 6.74B, and 1.21 × 10²⁰ from a quadrillion on."""
    digits, _, exponent = format_count(n).partition("e")
    if not exponent:
        return digits
    return f"{digits} × 10{exponent.translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


class ChartLayout:
    """The positions of everything in a chart, in pixels.

    Each stage gets its share of the width, but at least a sixth.

    Args:
        curves: one for each stage.
        css: the CSS class of the chart.
    """

    def __init__(self, title: str, unit: str, curves: list[Curve], width: int, height: int, css: str = ""):
        self.title = title
        self.unit = unit
        self.width = width
        self.height = height
        self.css = css
        self.left = LEFT_MARGIN
        self.right = width - RIGHT_MARGIN
        self.bottom = height - BOTTOM_MARGIN
        self.stage_curves = curves
        self.spans = [curve.span for curve in curves]
        self.boundaries = self._place_boundaries()
        self.names = self._place_names()
        self.top = TOP_MARGIN + NAME_HEIGHT * (1 + max(row for row, _ in self._name_rows))
        self.low, self.high = self._value_range()
        level_count = max(4, (self.bottom - self.top) // LEVEL_DISTANCE)
        level_values = round_ticks(self.low, self.high, level_count)
        self.digits = 2
        if len(level_values) > 1:
            self.digits = max(0, -math.floor(math.log10(level_values[1] - level_values[0]) + 1e-9))
        self.levels = [(self._y(level), f"{level:.{self.digits}f}") for level in level_values]
        self.ticks = self._place_ticks()
        self.curves = [self._place_curve(index, curve) for index, curve in enumerate(curves)]
        self.text = "; ".join(describe_curve(curve) for curve in curves)

    @property
    def edges(self) -> list[float]:
        """The boundaries between stages."""
        return self.boundaries[1:-1]

    def _place_boundaries(self) -> list[float]:
        lengths = [end - start for start, end in self.spans]
        whole = sum(lengths)
        shares = [length / whole if whole else 0 for length in lengths]
        widths = [max(share, 1 / 6) for share in shares]
        self.is_stretched = min(widths) > 0 and sum(widths) > 1.0001
        boundaries: list[float] = [self.left]
        for width in widths:
            boundaries.append(boundaries[-1] + (self.right - self.left) * width / sum(widths))
        return boundaries

    def _place_names(self) -> list[tuple[float, float, str, int]]:
        """The names of the stages above the curves, each in the first row that has room: (x, y, name, color)."""
        row_ends: list[float] = []
        self._name_rows: list[tuple[int, str]] = []
        names: list[tuple[float, float, str, int]] = []
        for curve, start in zip(self.stage_curves, self.boundaries, strict=False):
            name = curve.stage.name
            if len(name) > MAX_NAME_LENGTH:
                name = f"{name[: MAX_NAME_LENGTH - 1]}…"
            length = CHARACTER_WIDTH * len(name)
            x = max(min(start + 6, self.right - length), 0.0)
            row = next((index for index, end in enumerate(row_ends) if end < x), len(row_ends))
            row_ends[row : row + 1] = [x + length + 8]
            self._name_rows.append((row, name))
            names.append((x, 14 + NAME_HEIGHT * row, name, curve.stage.color))
        return names

    def _value_range(self) -> tuple[float, float]:
        values = [value for curve in self.stage_curves for _, value in curve.training + curve.evaluation]
        low = min(values)
        high = max(values)
        padding = 0.06 * (high - low) or 0.1 * abs(high) or 1
        return low - padding, high + padding

    def _x(self, index: int, tokens: float) -> float:
        start, end = self.spans[index]
        share = (tokens - start) / (end - start) if end > start else 0.5
        width = self.boundaries[index + 1] - self.boundaries[index]
        return round(self.boundaries[index] + share * width, 1)

    def _y(self, value: float) -> float:
        return round(self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top), 1)

    def _place_ticks(self) -> list[tuple[float, str, str]]:
        """The ticks of the tokens: (x, label, SVG text anchor)."""
        ticks = [(float(self.left), format_large_count(self.spans[0][0]), "start")]
        for index, (start, end) in enumerate(self.spans):
            left = self.boundaries[index]
            right = self.boundaries[index + 1]
            if end > start:
                for tokens in round_ticks(start, end, max(1, int((right - left) / TICK_DISTANCE))):
                    x = self._x(index, tokens)
                    if left + 40 < x < right - 50:
                        ticks.append((x, format_large_count(tokens), "middle"))
            anchor = "middle" if index + 1 < len(self.spans) else "end"
            ticks.append((round(right, 1), format_large_count(end), anchor))
        return ticks

    def _place_curve(self, index: int, curve: Curve) -> dict:
        training = [(self._x(index, tokens), self._y(value)) for tokens, value in curve.training]
        evaluation = [(self._x(index, tokens), self._y(value)) for tokens, value in curve.evaluation]
        last_point = (evaluation or training)[-1]
        last_value = (curve.evaluation or curve.training)[-1][1]
        return {
            "color": curve.stage.color,
            "training": training,
            "evaluation": evaluation,
            "last": (*last_point, f"{last_value:.{self.digits + 2}f}"),
        }


def describe_curve(curve: Curve) -> str:
    """A curve in words, for screen readers."""
    parts = []
    for name, points in (("training", curve.training), ("evaluation", curve.evaluation)):
        if len(points) > 1:
            parts.append(f"{name} from {points[0][1]:.3f} to {points[-1][1]:.3f}")
        elif points:
            parts.append(f"{name} {points[0][1]:.3f}")
    return f"{curve.stage.name}: {', '.join(parts)}"


def is_preference_stage(stage: ReportStage) -> bool:
    """Whether the loss of a stage compares two answers, and is not one of tokens."""
    return stage.kind in STAGE_KINDS and STAGE_KINDS[stage.kind].headline[:1] == ("preference_accuracy",)


def draw_charts(stages: list[ReportStage]) -> dict[str, list[ChartLayout]]:
    """The chart of all losses in two shapes (`main`), and the small charts of preference tuning (`side`)."""
    trained = [stage for stage in stages if stage.is_trained]
    preference_stages = [stage for stage in trained if is_preference_stage(stage)]
    other_stages = [stage for stage in trained if not is_preference_stage(stage)]
    side = []
    for title, unit, training_key, evaluation_key in PREFERENCE_CHARTS:
        curves = nonempty_curves(preference_stages, training_key, evaluation_key)
        if curves:
            side.append(ChartLayout(title, unit, curves, width=350, height=206))
    main = []
    losses = nonempty_curves(other_stages, "loss", "eval_loss")
    if losses:
        units = {loss_unit(curve.stage.kind, curve.stage.metrics) for curve in losses}
        unit = units.pop() if len(units) == 1 else "nats"
        main.append(ChartLayout("Loss", unit, losses, width=720 if side else 1080, height=440, css="wide-only"))
        main.append(ChartLayout("Loss", unit, losses, width=350, height=320, css="narrow"))
    return {"main": main, "side": side}


def nonempty_curves(stages: list[ReportStage], training_key: str, evaluation_key: str) -> list[Curve]:
    curves = [make_curve(stage, training_key, evaluation_key) for stage in stages]
    return [curve for curve in curves if curve.training or curve.evaluation]
