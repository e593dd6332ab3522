"""Cross entropy summed over the target tokens, without the logits of the whole batch.

Trainer calls `compute_loss_func(outputs, labels, num_items_in_batch)` with the number of targets in the whole
accumulated batch over all processes, so a sum divided by it is the exact mean. The models' own losses are not: those of
BERT, RoBERTa, DistilBERT and others ignore that number and come out too large by the number of accumulation steps
(transformers issue 47688).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput

from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.models.attention import attention_autocast
from unlabeled.planning.memory import logits_at_a_time

ROW_MULTIPLE = 128  # in half precision on a CPU, the output head is computed for a multiple of this many positions
MIN_CHUNK = 16  # positions
GATHER_BELOW = 0.9  # share of positions with a target below which gathering them on a GPU is worth the wait


# --- Functions --------------------------------------------------------------------------------------------------------


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """The sum of -log p(target) over all targets, in nats, computed in float32.

    Args:
        logits: (rows, length, vocabulary), of any float dtype.
        labels: int64 (rows, length), -100 where there is no target.
        shift: True if position t predicts label t + 1 (causal models), False if it predicts label t.

    Returns:
        float32 scalar.
    """
    targets = align_labels(labels, shift).flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def align_labels(labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """Labels by the position that predicts them: (rows, length), with `shift` one to the left."""
    if not shift:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def linear_cross_entropy_sum(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gather: bool = True,
) -> torch.Tensor:
    """`cross_entropy_sum(linear(hidden_states, weight, bias), labels)` without the logits of all positions.

    The logits are the largest tensor in the training step of a small model. Here they are computed for the positions
    that have a target, in chunks that stay in the cache, and the gradients of a chunk are computed with it, so that
    only the gradients are kept for the backward pass. Value and gradients are the same up to rounding.

    Args:
        hidden_states: (positions, width), in the dtype of the matrix products; sums are in float32.
        labels: int64 (positions,), -100 where there is no target.
        weight: (vocabulary, width), of any float dtype.
        bias: (vocabulary,), or None.
        gather: select the positions with a target first. Counting them makes the main thread wait for a GPU, which
            does not pay where nearly all positions have one.

    Returns:
        float32 scalar, in nats.
    """
    if gather:
        positions = _target_positions(hidden_states, labels)
        if len(positions) < len(labels):
            hidden_states = hidden_states[positions]
            labels = labels[positions]
    return LinearCrossEntropySum.apply(hidden_states, labels, weight, bias)


def _target_positions(hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 indices of the positions that have a target.

    On a CPU in half precision oneDNN compiles and keeps a kernel for each number of rows. There the indices are filled
    up with positions that have no target, and so add nothing, to a multiple of `ROW_MULTIPLE`.
    """
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    if hidden_states.device.type == "cpu" and hidden_states.dtype.itemsize == 2:
        missing = -len(positions) % ROW_MULTIPLE
        without_target = (labels == IGNORE_INDEX).nonzero()[:missing, 0]
        positions = torch.cat([positions, without_target])
    return positions


class LinearCrossEntropySum(torch.autograd.Function):
    """Forward and backward pass of `linear_cross_entropy_sum`.

    With logits z = W h + b of a position and its target y, the loss is log(sum_v exp z_v) - z_y, and its gradients are

        dz = softmax(z) - onehot(y),   dh = dz W,   dW = sum dz h^T,   db = sum dz.

    They are linear in the gradient of the loss, so they are computed in the forward pass and scaled in the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dtype = hidden_states.dtype
        cast_weight = weight.to(dtype)
        needs_hidden, _, needs_weight, needs_bias = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden_states) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None

        loss = torch.zeros((), device=hidden_states.device)
        chunk_size = max(logits_at_a_time(hidden_states.device.type) // len(weight), MIN_CHUNK)
        for start in range(0, len(hidden_states), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden = hidden_states[chunk]
            targets = labels[chunk, None]
            has_target = (targets != IGNORE_INDEX).float()
            targets = targets.clamp(min=0)

            # The logits' memory is reused step by step, for exponentials, probabilities and gradients.
            logits = (hidden @ cast_weight.T).float()
            if bias is not None:
                logits += bias
            logits -= logits.amax(dim=1, keepdim=True)
            target_logits = logits.gather(1, targets)
            exponentials = logits.exp_()
            normalizer = exponentials.sum(dim=1, keepdim=True)
            loss += ((normalizer.log() - target_logits) * has_target).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            logits_grad = exponentials.mul_(has_target / normalizer)
            logits_grad.scatter_add_(1, targets, -has_target)
            if bias_grad is not None:
                bias_grad += logits_grad.sum(dim=0)
            logits_grad = logits_grad.to(dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, cast_weight, out=hidden_grad[chunk])
            if weight_grad is not None:
                if dtype == torch.float32:
                    weight_grad.addmm_(logits_grad.T, hidden)
                else:
                    weight_grad += logits_grad.T @ hidden
        ctx.gradients = (hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = (dtype, weight.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(
        ctx: Any, loss_grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, torch.Tensor | None, torch.Tensor | None]:
        gradients = ctx.gradients
        ctx.gradients = None  # they are scaled in place, so there is only one backward pass
        scaled = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            scaled.append(None if gradient is None else gradient.mul_(loss_grad).to(dtype))
        hidden_grad, weight_grad, bias_grad = scaled
        return hidden_grad, None, weight_grad, bias_grad


# --- For Trainer ------------------------------------------------------------------------------------------------------


class ChunkedLinearCrossEntropy:
    """`Trainer(compute_loss_func=...)`: the mean cross entropy of the targets of the whole batch, over all processes.

    While the model trains, forward hooks skip its output head, and the model returns the head's inputs as
    `outputs.last_hidden_state`. The head is computed here, by `linear_cross_entropy_sum`.

    If that would not give the same loss, `fused` is False and the loss is computed from `outputs.logits`: in models
    that change their logits after the head (BART adds a bias, Gemma 2 caps them), which is tested by running the model,
    with a head that is not a plain `nn.Linear`, as with adapters or quantization, and under ZeRO-3, where the head's
    weights are available only while it runs.

    Args:
        model: a model with an output head. The hooks stay on it until `remove` is called.
        shift: True if position t predicts label t + 1 (causal models), False if it predicts label t.
        target_share: share of the positions that have a target.

    Attributes:
        fused: whether the head is computed here.
        head_share: share of the positions for which the head is computed, or None if it is left to the model.
    """

    def __init__(self, model: PreTrainedModel, shift: bool, target_share: float = 1.0) -> None:
        self.shift = shift
        self.head = model.get_output_embeddings()
        self.product_dtype = torch.float32
        self._hidden_states: torch.Tensor | None = None
        self._active_in_evaluation = False
        self._hooks = [
            self.head.register_forward_pre_hook(self._skip_head),
            self.head.register_forward_hook(self._return_hidden_states),
        ]
        is_plain = type(self.head) is nn.Linear
        self.fused = is_plain and not is_deepspeed_zero3_enabled() and self._head_is_last(model)
        self.head_share = target_share if self.fused else None
        if self.fused:
            self._hooks.append(model.register_forward_hook(self._rename_output))
        else:
            self.remove()

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int = 1) -> torch.Tensor:
        """The loss of a batch.

        Args:
            outputs: what the model returned.
            labels: int64 (rows, length), -100 where there is no target.
            num_items_in_batch: targets in the whole batch, over all accumulation steps and processes.
        """
        if not self.fused:
            return cross_entropy_sum(outputs.logits, labels, self.shift) / num_items_in_batch
        # Accelerate converts outputs to float32; the head's product is made in the dtype that the model would use.
        hidden_states = outputs.last_hidden_state.flatten(0, 1).to(self.product_dtype)
        targets = align_labels(labels, self.shift).flatten()
        gather = self.head_share < GATHER_BELOW or not (hidden_states.is_cuda and hidden_states.requires_grad)
        total = linear_cross_entropy_sum(hidden_states, targets, self.head.weight, self.head.bias, gather)
        return total / num_items_in_batch

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Inside this context the head is skipped in evaluation mode too."""
        self._active_in_evaluation = True
        try:
            yield
        finally:
            self._active_in_evaluation = False

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _is_active(self) -> bool:
        return self.head.training or self._active_in_evaluation

    def _skip_head(self, head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Forward pre-hook of the head: keep its input, and give it no positions to compute."""
        if not self._is_active():
            return None
        (self._hidden_states,) = inputs
        device_type = self._hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            self.product_dtype = torch.get_autocast_dtype(device_type)
        else:
            self.product_dtype = self._hidden_states.dtype
        return (self._hidden_states[..., :0, :],)

    def _return_hidden_states(
        self, head: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Forward hook of the head: return its input instead of its output."""
        hidden_states = self._hidden_states
        self._hidden_states = None
        return hidden_states

    def _rename_output(self, model: nn.Module, inputs: tuple, outputs: Any) -> BaseModelOutput | None:
        """Forward hook of the model, which has taken the hidden states for logits."""
        if not self._is_active():
            return None
        return BaseModelOutput(last_hidden_state=outputs.logits)

    @torch.no_grad()
    def _head_is_last(self, model: PreTrainedModel) -> bool:
        """Whether the model returns what its head returns, unchanged. Tested with the hooks of the head in place."""
        head_outputs = []
        was_training = model.training
        hook = self.head.register_forward_hook(lambda head, inputs, output: head_outputs.append(output))
        try:
            ids = torch.tensor([[5, 6, 7]], device=model.device)
            inputs = {"input_ids": ids}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids
            with self.in_evaluation(), attention_autocast(model):
                logits = model.eval()(**inputs).logits
            return logits.shape == head_outputs[0].shape and bool(torch.equal(logits, head_outputs[0]))
        except RuntimeError:  # something of the size of the vocabulary is added to the logits
            return False
        finally:
            hook.remove()
            model.train(was_training)
