"""Lengths of inputs and targets under span corruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unlabeled.errors import UserError


@dataclass(frozen=True)
class Denoiser:
    """A span corruption (Raffel et al. 2019, arXiv:1910.10683). UL2 mixes several (Tay et al. 2022, arXiv:2205.05131).

    Of a text, round(length · `noise_density`) tokens are noise, in spans of `mean_noise_span_length` tokens on average.
    A text begins with a span that is kept and ends with a noise span, so a single span of a quarter of the text makes
    a prefix language model.

    Attributes:
        noise_density: The share of the tokens that are noise, above 0 and below 1.
        mean_noise_span_length: The mean length of a noise span in tokens, at least 1.
        mode: A token in front of the inputs that tells the model which denoiser it is.
    """

    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    mode: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise UserError(f"noise_density is {self.noise_density}; set it above 0 and below 1")
        if not self.mean_noise_span_length >= 1:
            raise UserError(f"mean_noise_span_length is {self.mean_noise_span_length}; set it to 1 or more")

    def counts(self, length: int) -> tuple[int, int]:
        """Return the noise tokens and the noise spans of a text of `length` tokens, at least 2."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(noise / self.mean_noise_span_length), 1), length - noise)
        return noise, spans

    def lengths(self, length: int) -> tuple[int, int]:
        """Return the input tokens and the target tokens that a text of `length` tokens becomes.

        A sentinel for each span, the mode and the end-of-text token are counted.
        """
        noise, spans = self.counts(length)
        inputs = length - noise + spans + 1
        if self.mode is not None:
            inputs += 1
        return inputs, noise + spans + 1

    def fitting(self, inputs_length: int) -> tuple[int, int]:
        """Return the length of the longest text that becomes at most `inputs_length` inputs, and its target tokens.

        At a density of 0.5, both are one token less if the targets would be longer than the inputs, as in T5.
        """
        length = 2
        while self.lengths(length + 1)[0] <= inputs_length:
            length += 1
        _, targets = self.lengths(length)
        if self.noise_density == 0.5 and targets > inputs_length:
            return length - 1, targets - 1
        return length, targets


def span_lengths(denoisers: Sequence[Denoiser], max_length: int) -> tuple[int, int]:
    """Return the length of the longest text that fits into a row, and its largest number of target tokens.

    Args:
        denoisers: The denoisers, any of which a text may get.
        max_length: Input tokens in a row.
    """
    if len(denoisers) == 1:
        return denoisers[0].fitting(max_length)
    length = min(denoiser.fitting(max_length)[0] for denoiser in denoisers)
    return length, max(denoiser.lengths(length)[1] for denoiser in denoisers)
