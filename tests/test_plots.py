"""Plots are written as a whole, at their documented size, whatever the history holds."""

import math
import sys

import numpy as np
import pytest
from PIL import Image

from unlabeled.reporting.plots import EVALUATION_COLOR, TRAINING_COLOR, merge_rare_classes, moving_average, plot_loss

TRAINING = [{"tokens": 2048 * (i + 1), "loss": 1 + math.exp(-i / 20)} for i in range(100)]
EVALUATION = [{"tokens": 2048 * i, "eval_loss": 1 + math.exp(-i / 20)} for i in (0, 50, 100)]


def draw(path, history, **options) -> np.ndarray:
    """Plot, and return the image as (height, width, 3)."""
    plot_loss(history, path, "tiny · causal", **options)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1600, 900)
        return np.asarray(image.convert("RGB"))


def has_color(image: np.ndarray, color: str) -> bool:
    return bool((image == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any())


def test_training_and_evaluation(tmp_path):
    image = draw(tmp_path / "loss.png", TRAINING + EVALUATION, references={"unigram entropy": 2.5})
    assert has_color(image, TRAINING_COLOR) and has_color(image, EVALUATION_COLOR)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]  # no temporary file is left


def test_without_evaluation(tmp_path):
    image = draw(tmp_path / "loss.png", TRAINING, unit="nats per masked token")
    assert has_color(image, TRAINING_COLOR) and not has_color(image, EVALUATION_COLOR)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "history",
    [
        [],
        TRAINING[:1],
        EVALUATION[:1],
        [{"tokens": 5, "loss": math.nan}, {"tokens": 6, "loss": math.inf}, {"tokens": 6, "eval_loss": math.nan}],
        [*TRAINING[:50], {"tokens": 2048 * 51, "loss": math.nan}, *TRAINING[51:]],
        [*TRAINING, {"train_runtime": 3.2, "loss": 1.0}, {"tokens": 204800, "learning_rate": 1e-3}],
    ],
    ids=["empty", "one point", "one evaluation at the start", "nothing finite", "NaN inside", "foreign entries"],
)
def test_odd_histories(tmp_path, history):
    draw(tmp_path / "loss.png", history, references={"floor $x_$": 0.99})


def test_failed_write_keeps_the_old_plot(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    draw(path, TRAINING)
    before = path.read_bytes()

    def full(self, temporary, **_):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plot_loss(TRAINING[:2], path, "tiny · causal")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pyplot_is_not_imported(tmp_path):
    had = "matplotlib.pyplot" in sys.modules
    draw(tmp_path / "loss.png", TRAINING)
    assert ("matplotlib.pyplot" in sys.modules) == had


def test_moving_average():
    assert moving_average(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    line = np.linspace(5, 1, 400)
    assert moving_average(line)[:390] == pytest.approx(line[:390])  # no lag; only the end has no points to its right
    gap = np.where(np.arange(200) == 100, math.nan, 2.0)
    assert np.flatnonzero(np.isnan(moving_average(gap))).tolist() == [100]


def test_merged_classes():
    """Of 22 classes the 19 with the most examples stay, in the order of their sizes; all counts are kept."""
    counts = np.diag(np.arange(1, 23))
    counts[0, 21] = 1  # of the smallest class, predicted as the largest
    merged, names = merge_rare_classes(counts, [str(i) for i in range(22)])
    assert names == [str(i) for i in range(21, 2, -1)] + ["3 others"]
    assert merged.sum() == counts.sum()
    assert merged[19, 0] == 1 and merged[19, 19] == 1 + 2 + 3 and merged[0, 0] == 22
