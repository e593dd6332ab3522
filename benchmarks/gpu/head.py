"""The output head and the loss."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import IGNORE, Bench
from unlabeled.models.losses import linear_cross_entropy_sum


def chunk_gradients(
    hidden: torch.Tensor, labels: torch.Tensor, cast: torch.Tensor, to_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a chunk of positions in nats, and the gradient of its hidden states.

    Args:
        hidden: (positions, width), bfloat16.
        labels: int64 (positions,), -100 where there is no target.
        cast: weight of the output head, (vocabulary, width), bfloat16.
        to_weight: its gradient, (vocabulary, width), float32; this chunk is added to it.
    """
    counts = (labels != IGNORE).float()[:, None]
    target = labels.clamp(min=0)[:, None]
    logits = (hidden @ cast.T).float()
    log_total = logits.logsumexp(dim=1, keepdim=True)
    nats = ((log_total - logits.gather(1, target)) * counts).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    scores = ((logits - log_total).exp() - (columns == target).float()) * counts
    scores = scores.to(hidden.dtype)
    to_weight.add_(scores.T @ hidden)
    return nats, scores @ cast


class CompiledHead(torch.autograd.Function):
    """`losses.linear_cross_entropy_sum` with `body`, a compiled or eager `chunk_gradients`.

    Args of `forward`: hidden (positions, width); labels int64 (positions,); weight (vocabulary, width); body; size of a
    chunk in positions. Returns the loss in nats, summed over the targets.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, body: Callable, size: int
    ) -> torch.Tensor:
        cast = weight.to(hidden.dtype)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        hidden_gradients = []
        nats = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), size):
            chunk_nats, to_hidden = body(hidden[start : start + size], labels[start : start + size], cast, to_weight)
            nats += chunk_nats
            hidden_gradients.append(to_hidden)
        ctx.gradients = torch.cat(hidden_gradients), to_weight.to(weight.dtype)
        return nats

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_hidden, to_weight = ctx.gradients
        ctx.gradients = None
        return to_hidden.mul_(gradient.to(to_hidden.dtype)), None, to_weight.mul_(gradient), None, None


def apply_compiled_head(
    hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, body: Callable, size: int
) -> torch.Tensor:
    return CompiledHead.apply(hidden, labels, weight, body, size)


def all_logits(hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The summed loss with all logits in memory."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def head(bench: Bench) -> None:
    """Measure output head and loss, forward and backward, with the size of a step."""
    shape = bench.shape
    torch._dynamo.config.recompile_limit = 64  # each chunk size compiles; beyond the limit it runs eagerly
    torch.manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, device=bench.device, dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(shape.vocabulary, shape.width, device=bench.device)).requires_grad_()
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device=bench.device)
    labels[::400] = IGNORE
    masked = labels.clone()
    masked[torch.rand(shape.tokens, device=bench.device) > 0.3] = IGNORE
    products = 3 * 2 * shape.tokens * shape.width * shape.vocabulary
    references: dict[str, tuple] = {}  # the first results for the same labels

    def measure(name: str, loss: Callable, own_labels=labels, key: str = "all") -> None:
        with bench.attempt(name):
            gradients = torch.autograd.grad(loss(hidden, own_labels, weight), (hidden, weight))
            value = loss(hidden.detach(), own_labels, weight.detach()).float()
            results = (value, *(gradient.float() for gradient in gradients))
            references.setdefault(key, results)
            differences = []
            for result, reference in zip(results, references[key], strict=True):
                differences.append(float((result - reference).norm() / reference.norm()))
            del gradients, results

            def call():
                torch.autograd.grad(loss(hidden, own_labels, weight), (hidden, weight))

            ms = bench.milliseconds(call)
            count = int((own_labels != IGNORE).sum())
            bench.record(
                name,
                ms=ms,
                tflops=products * count / shape.tokens / ms / 1e9,
                extra_gb=bench.extra_gigabytes(call),
                difference_of_loss=differences[0],
                difference_of_hidden_gradient=differences[1],
                difference_of_weight_gradient=differences[2],
            )

    measure("all logits, eager", all_logits)
    measure("linear_cross_entropy_sum, no gathering", partial(linear_cross_entropy_sum, bias=None, gather=False))
    measure("linear_cross_entropy_sum, gathering", partial(linear_cross_entropy_sum, bias=None, gather=True))
    measure("all logits, torch.compile", bench.compiled(all_logits, dynamic=False))
    body = bench.compiled(chunk_gradients, dynamic=False)
    sizes = (16384, 8192, 4096, 2048, 1024, 32768) if bench.on_gpu else (64, 128)
    for size in sizes:
        label = f"chunks of {size:,} compiled"
        if size == 1024:
            label += " (Liger's size)"
        measure(label, partial(apply_compiled_head, body=body, size=size))
    with bench.attempt("Liger's fused linear cross entropy"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def liger(hidden, labels, weight):
            cast = weight.to(hidden.dtype)
            out = LigerFusedLinearCrossEntropyFunction.apply(hidden, cast, labels, None, None, IGNORE, 0.0, 0.0, "sum")
            return out[0]

        measure("Liger's fused linear cross entropy", liger)

    # A masked model: 30 % of the positions have a target.
    measure(
        "30 % targets: linear_cross_entropy_sum",
        partial(linear_cross_entropy_sum, bias=None, gather=True),
        masked,
        "masked",
    )
    max_targets = math.ceil(int((masked != IGNORE).sum()) / 256) * 256

    def at_targets(hidden, labels, weight):
        positions = torch.nonzero_static(labels != IGNORE, size=max_targets, fill_value=-1)[:, 0]
        targets = labels[positions.clamp(min=0)].masked_fill(positions < 0, IGNORE)
        return CompiledHead.apply(hidden[positions.clamp(min=0)], targets, weight, body, 8192)

    name = "30 % targets: counted by the collator (nonzero_static), compiled chunks of 8,192"
    measure(name, at_targets, masked, "masked")
