"""How long the inputs and the targets of span corruption are; a plan asks without loading torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unlabeled.errors import UserError


@dataclass(frozen=True)
class Denoiser:
    """A way to corrupt spans (Raffel et al. 2019, arXiv:1910.10683); UL2 mixes several (Tay et al. 2022).

    Of a text, round(length · `noise_density`) tokens are noise, in spans of `mean_noise_span_length` tokens on average.
    It starts with a span that stays and ends with one that is noise, so one span of a quarter of the text is a prefix
    language model. `mode` is a token in front of the inputs, which tells the model what it is asked for.
    """

    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    mode: str | None = None

    def __post_init__(self):
        if not 0 < self.noise_density < 1:
            raise UserError(f"noise_density is {self.noise_density}; set it above 0 and below 1")
        if not self.mean_noise_span_length >= 1:
            raise UserError(f"mean_noise_span_length is {self.mean_noise_span_length}; set it to 1 or more")

    def counts(self, length: int) -> tuple[int, int]:
        """(noise tokens, noise spans) of a text of `length` tokens, at least 2."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, min(max(round(noise / self.mean_noise_span_length), 1), length - noise)

    def lengths(self, length: int) -> tuple[int, int]:
        """(input tokens, target tokens) that a text of `length` tokens becomes: sentinels, mode and end counted."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1 + (self.mode is not None), noise + spans + 1

    def fitting(self, inputs_length: int) -> tuple[int, int]:
        """(tokens of the longest text that becomes `inputs_length` inputs, its target tokens): nothing is padded.

        At a density of .5 it is T5's own exception: one token less where the targets would be longer than the inputs.
        """
        length = 2
        while self.lengths(length + 1)[0] <= inputs_length:
            length += 1
        targets = self.lengths(length)[1]
        one = self.noise_density == 0.5 and targets > inputs_length
        return length - one, targets - one


def span_lengths(denoisers: Sequence[Denoiser], max_length: int) -> tuple[int, int]:
    """(tokens of the longest text, most target tokens) of a row of `max_length` inputs, whichever denoiser it gets."""
    length = min(denoiser.fitting(max_length)[0] for denoiser in denoisers)
    if len(denoisers) == 1:
        return denoisers[0].fitting(max_length)
    return length, max(denoiser.lengths(length)[1] for denoiser in denoisers)
