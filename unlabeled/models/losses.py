"""The loss: nats summed over the targets, with the output head computed at the targets alone, a few at a time.

Trainer calls `compute_loss_func(outputs, labels, num_items_in_batch)` with the number of targets of the whole
accumulated batch over all processes. Left to the models' own losses, BERT, RoBERTa, DistilBERT and others come out
larger by the factor of the accumulation, because they ignore that number (transformers issue 47688).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.integrations import is_deepspeed_zero3_enabled

from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.models.attention import precision_of_attention
from unlabeled.planning.memory import logits_at_a_time

ROWS_OF_A_KERNEL = 128  # positions at which the head is computed are a multiple of it, in half precision on a CPU


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """The sum of -log p over all targets, in nats, computed in float32.

    Args:
        logits: (rows, length, vocabulary), any float type.
        labels: int64 (rows, length), -100 where there is no target.
        shift: True when position t predicts label t + 1 (causal), False when it predicts label t (masked, spans).
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1), _aligned(labels, shift).flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def linear_cross_entropy_sum(
    hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias=None, gather: bool = True
) -> torch.Tensor:
    """`cross_entropy_sum(linear(hidden, weight, bias), labels)` without the logits: the same number and gradients.

    The head is a matrix product with the whole vocabulary, and its logits are the largest tensor of a small model's
    step. Here it is computed for the positions that have a target, for as many at a time as stay in the cache, and its
    gradients at once, so that nothing but these is kept for the backward pass.

    Args:
        hidden: (positions, width), in the precision that products are to be made in; sums are in float32.
        labels: int64 (positions,), -100 where there is no target.
        weight, bias: (vocabulary, width) and (vocabulary,) or None, of any float type.
        gather: pick the positions with a target first. To count them, the main thread waits for a GPU; where nearly all
            positions have one it need not.
    """
    if gather:
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        if hidden.device.type == "cpu" and hidden.dtype.itemsize == 2:
            # oneDNN compiles a kernel for each number of rows and keeps it. Some positions without a target, which add
            # nothing, make these numbers few.
            missing = -len(places) % ROWS_OF_A_KERNEL
            places = torch.cat([places, (labels == IGNORE_INDEX).nonzero()[:missing, 0]])
        if len(places) < len(labels):
            hidden, labels = hidden[places], labels[places]
    return _HeadNats.apply(hidden, labels, weight, bias)


class _HeadNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, weight, bias):
        cast = weight.to(hidden.dtype)
        size = max(logits_at_a_time(hidden.device.type) // len(weight), 16)
        nats = torch.zeros((), device=hidden.device)
        wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight, to_bias = (
            torch.zeros_like(x, dtype=torch.float32) if needed else None
            for x, needed in zip((weight, bias), wanted[1:], strict=True)
        )
        for start in range(0, len(hidden), size):
            some, own = hidden[start : start + size], labels[start : start + size, None]
            counts, own = (own != IGNORE_INDEX).float(), own.clamp(min=0)
            scores = (some @ cast.T).float()
            if bias is not None:
                scores += bias
            scores -= scores.amax(dim=1, keepdim=True)
            right = scores.gather(1, own)
            total = scores.exp_().sum(dim=1, keepdim=True)
            nats += ((total.log() - right) * counts).sum()
            if not any(wanted):
                continue
            scores *= counts / total  # the gradient of the scores: what they say, less what they should have said
            scores.scatter_add_(1, own, -counts)
            if to_bias is not None:
                to_bias += scores.sum(dim=0)
            scores = scores.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(scores, cast, out=to_hidden[start : start + size])
            if to_weight is not None and hidden.dtype == torch.float32:
                to_weight.addmm_(scores.T, some)
            elif to_weight is not None:
                to_weight += scores.T @ some
        ctx.made, ctx.types = (to_hidden, to_weight, to_bias), (hidden.dtype, weight.dtype, weight.dtype)
        return nats

    @staticmethod
    def backward(ctx, gradient):
        made, ctx.made = ctx.made, None  # scaled in place, so there is one backward pass
        hidden, weight, bias = (
            x if x is None else x.mul_(gradient).to(t) for x, t in zip(made, ctx.types, strict=True)
        )
        return hidden, None, weight, bias


def _aligned(labels: torch.Tensor, shift: bool) -> torch.Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shift else labels


class ChunkedLinearCrossEntropy:
    """`Trainer(compute_loss_func=...)`: nats per target of the whole batch, over all processes.

    While the model trains, two forward hooks make its head pass on what it is given, so that `outputs.logits` are the
    hidden states, and the head is computed here. `fused` is False, and the loss is taken from logits as usual, where
    that would not be the same: where a model does something to its logits (BART adds a bias, Gemma caps them), which
    is tried out on the model itself, and under ZeRO-3, where the head's weights are there only while it runs.

    Args:
        model: with an output head; hooks are left on it.
        shift: True when position t predicts label t + 1 (causal), False when it predicts label t (masked, spans).
        target_share: share of the positions that have a target. For the plan, `head_share` is that of those at which
            the head is computed, None where it is left to the model.
    """

    def __init__(self, model, shift: bool, target_share: float = 1.0):
        self.shift, self.head = shift, model.get_output_embeddings()
        self.precision, self._hidden, self._also_in_evaluation = torch.float32, None, False
        self._hooks = [
            self.head.register_forward_pre_hook(self._keep), self.head.register_forward_hook(self._pass_on)
        ]  # fmt: skip
        plain = type(self.head) is torch.nn.Linear  # and not one that an adapter or a quantisation is wrapped around
        self.fused = plain and not is_deepspeed_zero3_enabled() and self._is_last(model)
        self.head_share = target_share if self.fused else None
        if not self.fused:
            self.remove()

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int = 1) -> torch.Tensor:
        if not self.fused:
            return cross_entropy_sum(outputs.logits, labels, self.shift) / num_items_in_batch
        hidden = outputs.logits.flatten(0, 1).to(self.precision)
        labels = _aligned(labels, self.shift).flatten()
        gather = self.head_share < 0.9 or not (hidden.is_cuda and hidden.requires_grad)
        return linear_cross_entropy_sum(hidden, labels, self.head.weight, self.head.bias, gather) / num_items_in_batch

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """While this lasts, it is the same for a model in evaluation mode."""
        self._also_in_evaluation = True
        try:
            yield
        finally:
            self._also_in_evaluation = False

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, head, inputs: tuple) -> tuple | None:
        if not (head.training or self._also_in_evaluation):
            return None
        kind, (self._hidden,) = inputs[0].device.type, inputs
        self.precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs[0].dtype
        return (inputs[0][..., :0, :],)

    def _pass_on(self, head, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        hidden, self._hidden = self._hidden, None
        return hidden

    @torch.no_grad()
    def _is_last(self, model) -> bool:
        """Whether what the head gives are the logits, and nothing is done to them."""
        passed, was_training = [], model.training
        hook = self.head.register_forward_hook(lambda head, inputs, output: passed.append(output))
        try:
            ids = torch.tensor([[5, 6, 7]], device=model.device)
            inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
            with self.in_evaluation(), precision_of_attention(model):
                logits = model.eval()(**inputs).logits
            return logits.shape == passed[0].shape and bool(torch.equal(logits, passed[0]))
        except RuntimeError:  # something is added that has the size of the vocabulary
            return False
        finally:
            hook.remove()
            model.train(was_training)
