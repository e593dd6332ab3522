"""Stand-ins for `varlen_attn` where torch is too old, and where a CPU is to compile as a GPU does."""

import inspect
from functools import lru_cache

import torch

import unlabeled.models.attention


def add_missing_grouped_heads() -> str | None:
    """Repeat keys and values where `varlen_attn` of an older torch (2.11) has no `enable_gqa`.

    Returns:
        A note for the results, None if nothing was missing.
    """
    original = unlabeled.models.attention.varlen_attn
    if "enable_gqa" in inspect.signature(original).parameters:
        return None

    def varlen_attn(query, key, value, *args, enable_gqa: bool = False, **options):
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        return original(query, key, value, *args, **options)

    unlabeled.models.attention.varlen_attn = varlen_attn
    return f"torch {torch.__version__}: varlen_attn has no enable_gqa, the benchmark repeats keys and values instead"


@lru_cache(maxsize=1)
def whole_graphs_on_cpu() -> None:
    """Make `varlen` on a CPU a single operator for the compiler, as it is on a GPU.

    Only for counting compilations: its gradients are zero.
    """
    by_document = unlabeled.models.attention.attend_by_document

    @torch.library.custom_op("unlabeled_benchmark::varlen", mutates_args=())
    def varlen(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        scale: float,
        back: int,
        ahead: int,
    ) -> torch.Tensor:
        arguments = (query, key, value, starts, starts, longest, longest)
        out = by_document(*arguments, scale=scale, window_size=(back, ahead), enable_gqa=False)
        return out.contiguous()

    @torch.library.custom_op("unlabeled_benchmark::varlen_backward", mutates_args=())
    def varlen_backward(
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        scale: float,
        back: int,
        ahead: int,
    ) -> list[torch.Tensor]:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

    @varlen.register_fake
    def _(query, key, value, starts, longest, scale, back, ahead):
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    @varlen_backward.register_fake
    def _(gradient, query, key, value, starts, longest, scale, back, ahead):
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

    def save_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.numbers = inputs[4:]

    def backward(ctx, gradient):
        return (*varlen_backward(gradient, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None)

    varlen.register_autograd(backward, setup_context=save_inputs)

    def attend_by_document(query, key, value, starts, _, longest, __, *, scale, window_size, enable_gqa):
        return varlen(query, key, value, starts, longest, scale, *window_size)

    unlabeled.models.attention.attend_by_document = attend_by_document
