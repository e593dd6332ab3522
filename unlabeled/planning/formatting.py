"""Counts, durations and the cost of a run as text."""

from __future__ import annotations

from typing import Any


def format_count(n: float) -> str:
    """Format a count with three significant digits.

    950, 12.3K, 124M, 6.74B, 1.2T; in scientific notation, as in 1.21e20, from 10^15 on.
    """
    value = float(f"{n:.3g}")
    if abs(value) >= 1e15:
        return f"{n:.2e}".replace("e+", "e")
    for suffix in ("", "K", "M", "B"):
        if abs(value) < 1000:
            return f"{value:.4g}{suffix}"
        value /= 1000
    return f"{value:.4g}T"


def format_duration(seconds: float) -> str:
    """Format a duration by its two largest units: 7 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def describe_cost(metrics: dict[str, Any]) -> str:
    """Describe what a run cost: training time, FLOPs, speed and peak memory, each beside its prediction.

    Args:
        metrics: the contents of `metrics.json`. What is missing or None is left out.
    """

    def expected(value: str | None) -> str:
        return f" (expected {value})" if value else ""

    parts = []
    seconds = metrics.get("train_seconds")
    if seconds:
        expected_seconds = metrics.get("expected_seconds")
        prediction = f"{expected_seconds:,.1f} s" if expected_seconds else None
        parts.append(f"{seconds:,.1f} s of training{expected(prediction)}")
    flops = metrics.get("flops")
    if flops:
        expected_flops = metrics.get("expected_flops")
        differs = expected_flops is not None and abs(flops / expected_flops - 1) > 0.005
        prediction = format_count(expected_flops) if differs else None
        parts.append(f"{format_count(flops)} FLOPs{expected(prediction)}")
    speed = metrics.get("flops_per_second")
    if speed:
        parts.append(f"{format_count(speed)} FLOP/s")
        if metrics.get("mfu"):
            parts.append(f"MFU {metrics['mfu']:.1%}")
    memory = metrics.get("peak_memory_bytes")
    if memory:
        # The peak is that of the whole process, evaluation and samples included; the prediction is that of a step.
        expected_memory = metrics.get("expected_memory_bytes")
        prediction = f"{expected_memory / 1e9:.2f} GB in training" if expected_memory else None
        parts.append(f"peak memory {memory / 1e9:.2f} GB{expected(prediction)}")
    return ", ".join(parts)
