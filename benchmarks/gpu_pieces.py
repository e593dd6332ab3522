"""Pieces of a training step by themselves, and whole steps in a plain loop, for `gpu.py`.

Each function takes a `Bench` and calls `bench.record(name, **figures)` for each figure as soon as it has it.
"""

import contextlib
import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100
EMPTY_DOCUMENTS = (0, 16, 64, 256, 1024, 2048)


@dataclass(frozen=True)
class Shape:
    """A model of GPT-2's kind and its batch."""

    rows: int = 64
    length: int = 1024
    layers: int = 12
    heads: int = 12
    head_dim: int = 64
    vocabulary: int = 50304
    repeats: int = 10
    steps: int = 15

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.rows * self.length


SMALL = Shape(rows=4, length=64, layers=2, heads=2, head_dim=16, vocabulary=640, repeats=2, steps=2)


@dataclass
class Bench:
    """Where it runs, how large, and where figures go."""

    device: torch.device
    shape: Shape
    record: Callable
    compile: bool = True  # False on a CPU, where a test has no time for it
    backend: str = "inductor"
    seconds: float = math.inf  # after which it will be ended

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def compiled(self, function, **options):
        return torch.compile(function, backend=self.backend, **options) if self.compile else function

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable, repeats: int | None = None, warmup: int = 3) -> float:
        """The median time of a call, by events on a GPU."""
        repeats = repeats or self.shape.repeats
        for _ in range(warmup if self.on_gpu else 1):
            call()
        times = []
        for _ in range(repeats):
            if self.on_gpu:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - begun))
        return statistics.median(times)

    def extra_gigabytes(self, call: Callable) -> float | None:
        """Peak memory that a call takes beside what is there; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    @contextlib.contextmanager
    def attempt(self, name: str):
        """An error in here is recorded under a name, and the rest goes on."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()}"
            self.record(name, error=reason[:300])


def add_missing_grouped_heads() -> str | None:
    """Let `models.attention` run on a torch whose `varlen_attn` has no `enable_gqa` (2.11); say so if it did."""
    import unlabeled.models.attention

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
    """Let `varlen` on a CPU be an operator that compilers see as one node, as it is on a GPU.

    For counting compilations only: its gradients are zeros.
    """
    import unlabeled.models.attention

    by_document = unlabeled.models.attention.attend_by_document

    @torch.library.custom_op("unlabeled_benchmark::varlen", mutates_args=())
    def varlen(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float,
        back: int, ahead: int,
    ) -> torch.Tensor:  # fmt: skip
        arguments = (query, key, value, starts, starts, longest, longest)
        out = by_document(*arguments, scale=scale, window_size=(back, ahead), enable_gqa=False)
        return out.contiguous()

    @torch.library.custom_op("unlabeled_benchmark::varlen_backward", mutates_args=())
    def varlen_backward(
        gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
        longest: int, scale: float, back: int, ahead: int,
    ) -> list[torch.Tensor]:  # fmt: skip
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

    @varlen.register_fake
    def _(query, key, value, starts, longest, scale, back, ahead):
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    @varlen_backward.register_fake
    def _(gradient, query, key, value, starts, longest, scale, back, ahead):
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.numbers = inputs[4:]

    def backward(ctx, gradient):
        return (*varlen_backward(gradient, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None)

    varlen.register_autograd(backward, setup_context=keep)

    def one_by_one(query, key, value, starts, _, longest, __, *, scale, window_size, enable_gqa):
        return varlen(query, key, value, starts, longest, scale, *window_size)

    unlabeled.models.attention.attend_by_document = one_by_one


# --- Documents -----------------------------------------------------------------------------------------------------


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Tokens of documents, log-normal as on the web, but shorter: half below 172, so that a row of 1,024 has four."""
    return np.clip(rng.lognormal(mean=5.15, sigma=1.0, size=count), 16, 8192).astype(int)


def packed_lengths(shape: Shape, count: int, seed: int = 0) -> list[list[int]]:
    """The lengths of the documents in each of `count` rows, cut and packed as `unlabeled.data.preparing` does."""
    from unlabeled.data.packing import best_fit, split_points

    rng = np.random.default_rng(seed)
    scale = shape.length / 1024
    pieces: list[int] = []
    while sum(pieces) < 1.2 * count * shape.length + shape.length:
        for length in document_lengths(rng, 64):
            cut = split_points(max(int(length * scale), 4), shape.length, overlap=1)
            pieces += [end - start for start, end in cut]
    rows = [[pieces[index] for index in row] for row in best_fit(pieces, shape.length)]
    order = rng.permutation(len(rows))[:count]
    return [rows[index] for index in order]


def document_starts(rows: list[list[int]], length: int) -> torch.Tensor:
    """int32: where each document of the rows, put one after the other, begins, and the end; padding is a document."""
    starts = []
    for index, row in enumerate(rows):
        filled = [*row, length - sum(row)] if sum(row) < length else row
        starts += (index * length + np.cumsum([0, *filled[:-1]])).tolist()
    return torch.tensor([*starts, len(rows) * length], dtype=torch.int32)


def document_ids(starts: torch.Tensor, shape: Shape) -> torch.Tensor:
    """int64 (rows, length): which document a token belongs to."""
    begins = torch.zeros(shape.tokens, dtype=torch.int64)
    begins[starts[:-1].long()] = 1
    return begins.cumsum(0).view(shape.rows, shape.length)


def padded_starts(starts: torch.Tensor, size: int) -> torch.Tensor:
    """`starts` with empty documents at the end, `size` numbers in all."""
    return torch.cat([starts, starts[-1:].expand(size - len(starts))])


class Rows(torch.utils.data.Dataset):
    """Packed rows of random tokens, in the form that the collators take."""

    def __init__(self, shape: Shape, count: int, vocabulary: int, seed: int = 0):
        self.lengths = packed_lengths(shape, count, seed)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        lengths = self.lengths[index]
        rng = np.random.default_rng(index)
        ids = rng.integers(8, self.vocabulary, sum(lengths))
        word_starts = np.ones(len(ids), dtype=bool)
        return {"input_ids": ids, "lengths": lengths, "word_starts": word_starts, "row": index, "epoch": 0}


# --- Machine -------------------------------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    """What the card does at best."""
    size = 8192 if bench.on_gpu else 256
    left = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    for name, call in {
        f"bf16 matrix product, {size} x {size} x {size}": lambda: left @ right,
        "the same, right matrix transposed": lambda: left @ right.T,
    }.items():
        ms = bench.milliseconds(call, repeats=20)
        bench.record(name, ms=ms, tflops=2 * size**3 / ms / 1e9)
    source = torch.empty(size * size * 8, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = bench.milliseconds(lambda: target.copy_(source), repeats=20)
    bench.record("copy on the device", ms=ms, gigabytes_per_second=2 * source.numel() * 2 / ms / 1e6)
    if bench.on_gpu:
        host = torch.empty(64 * 1024 * 1024, dtype=torch.uint8, pin_memory=True)
        card = torch.empty(host.shape, dtype=torch.uint8, device=bench.device)
        ms = bench.milliseconds(lambda: card.copy_(host, non_blocking=True))
        bench.record("64 MiB (one bool mask, 64 x 1,024 x 1,024) from pinned memory to the device", ms=ms)


# --- Output head and loss ------------------------------------------------------------------------------------------


def chunk_gradients(hidden, labels, cast, to_weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The body of a chunk of the head: its nats and the gradient of its hidden states; `to_weight` is added to.

    Args:
        hidden: (positions, width), bfloat16.
        labels: int64 (positions,), -100 where there is no target.
        cast: (vocabulary, width), bfloat16.
        to_weight: (vocabulary, width), float32.
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
    """`losses.linear_cross_entropy_sum` with `body`, compiled or not, in place of `chunk_gradients`."""

    @staticmethod
    def forward(ctx, hidden, labels, weight, body, size):
        cast = weight.to(hidden.dtype)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        parts = []
        nats = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), size):
            more, to_hidden = body(hidden[start : start + size], labels[start : start + size], cast, to_weight)
            nats += more
            parts.append(to_hidden)
        ctx.made = torch.cat(parts), to_weight.to(weight.dtype)
        return nats

    @staticmethod
    def backward(ctx, gradient):
        to_hidden, to_weight = ctx.made
        ctx.made = None
        return to_hidden.mul_(gradient.to(to_hidden.dtype)), None, to_weight.mul_(gradient), None, None


def all_logits(hidden, labels, weight) -> torch.Tensor:
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def head(bench: Bench) -> None:
    """Output head and loss, forward and backward, at the shape of a step."""
    from unlabeled.models.losses import linear_cross_entropy_sum

    shape = bench.shape
    torch._dynamo.config.recompile_limit = 64  # each size of a chunk is compiled; beyond the limit it would run eagerly
    torch.manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, device=bench.device, dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(shape.vocabulary, shape.width, device=bench.device)).requires_grad_()
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device=bench.device)
    labels[::400] = IGNORE
    masked = labels.clone()
    masked[torch.rand(shape.tokens, device=bench.device) > 0.3] = IGNORE
    products = 3 * 2 * shape.tokens * shape.width * shape.vocabulary
    reference = {}

    def measure(name: str, loss: Callable, own_labels=labels, key: str = "all") -> None:
        with bench.attempt(name):
            gradients = torch.autograd.grad(loss(hidden, own_labels, weight), (hidden, weight))
            value = loss(hidden.detach(), own_labels, weight.detach()).float()
            found = (value, *(gradient.float() for gradient in gradients))
            expected = reference.setdefault(key, found)
            differences = [
                float((one - two).norm() / two.norm()) for one, two in zip(found, expected, strict=True)
            ]  # fmt: skip
            del gradients, found

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
    measure(
        "linear_cross_entropy_sum as it is, no gathering", partial(linear_cross_entropy_sum, bias=None, gather=False)
    )
    measure("linear_cross_entropy_sum as it is, gathering", partial(linear_cross_entropy_sum, bias=None, gather=True))
    measure("all logits, torch.compile", bench.compiled(all_logits, dynamic=False))
    body = bench.compiled(chunk_gradients, dynamic=False)
    sizes = (16384, 8192, 4096, 2048, 1024, 32768) if bench.on_gpu else (64, 128)
    for size in sizes:
        name = f"chunks of {size:,} compiled" + (" (Liger's size)" if size == 1024 else "")
        measure(name, lambda h, la, w, size=size: CompiledHead.apply(h, la, w, body, size))
    with bench.attempt("Liger's fused linear cross entropy"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def liger(hidden, labels, weight):
            cast = weight.to(hidden.dtype)
            out = LigerFusedLinearCrossEntropyFunction.apply(hidden, cast, labels, None, None, IGNORE, 0.0, 0.0, "sum")
            return out[0]

        measure("Liger's fused linear cross entropy", liger)

    # A masked model: 30 % of the positions have a target.
    measure(
        "30 % targets: linear_cross_entropy_sum as it is",
        partial(linear_cross_entropy_sum, bias=None, gather=True),
        masked,
        "masked",
    )
    count = int((masked != IGNORE).sum())
    room = -(-count // 256) * 256

    def counted(hidden, labels, weight):
        places = torch.nonzero_static(labels != IGNORE, size=room, fill_value=-1)[:, 0]
        picked = labels[places.clamp(min=0)].masked_fill(places < 0, IGNORE)
        return CompiledHead.apply(hidden[places.clamp(min=0)], picked, weight, body, 8192)

    name = "30 % targets: counted by the collator (nonzero_static), compiled chunks of 8,192"
    measure(name, counted, masked, "masked")


# --- Attention -----------------------------------------------------------------------------------------------------


def attention(bench: Bench) -> None:
    """Attention of one layer, forward and backward, over packed documents."""
    from torch.nn.attention.varlen import varlen_attn

    from unlabeled.data.attention_masks import block_mask

    shape = bench.shape
    rows = packed_lengths(shape, shape.rows)
    starts = document_starts(rows, shape.length)
    longest = int(starts.diff().max())
    bench.record(
        "documents in the batch", value=len(starts) - 1, longest=longest, mean=shape.tokens / (len(starts) - 1)
    )
    ids = document_ids(starts, shape)
    window = 64
    masks = {"document": block_mask(ids), "window": block_mask(ids, window)}
    masks = {name: mask.to(bench.device) for name, mask in masks.items()}
    causal_mask = masks["document"].tril()
    options = {"device": bench.device, "dtype": torch.bfloat16}
    sizes = (shape.rows, shape.heads, shape.length, shape.head_dim)
    batched = [torch.randn(sizes, **options).requires_grad_() for _ in range(3)]
    flat = [x.detach().transpose(1, 2).flatten(0, 1).contiguous().requires_grad_() for x in batched]
    upstream = torch.randn(sizes, **options)
    flat_upstream = upstream.transpose(1, 2).flatten(0, 1).contiguous()

    measure = partial(both_passes, bench)
    sdpa = F.scaled_dot_product_attention
    measure("causal: sdpa, block mask", partial(sdpa, attn_mask=causal_mask), batched, upstream)
    measure("causal: sdpa, is_causal, documents not apart", partial(sdpa, is_causal=True), batched, upstream)

    def varlen(query, key, value, *, ends, longest=shape.length, window=(-1, 0)):
        return varlen_attn(query, key, value, ends, ends, longest, longest, window_size=window)

    if bench.on_gpu:
        real = starts.to(bench.device)
        measure("causal: varlen, real cu_seq_lens", partial(varlen, ends=real), flat, flat_upstream)
        name = "causal: varlen, real cu_seq_lens, max_length of the longest document"
        measure(name, partial(varlen, ends=real, longest=longest), flat, flat_upstream)
        whole = torch.arange(0, shape.tokens + 1, shape.length, dtype=torch.int32, device=bench.device)
        measure("causal: varlen, one document a row", partial(varlen, ends=whole), flat, flat_upstream)
        for more in EMPTY_DOCUMENTS[1:]:
            ends = padded_starts(starts, len(starts) + more).to(bench.device)
            measure(f"causal: varlen, {more:,} empty documents added", partial(varlen, ends=ends), flat, flat_upstream)
    measure("both directions: sdpa, block mask", partial(sdpa, attn_mask=masks["document"]), batched, upstream)
    measure("window of 64 to each side: sdpa, block mask", partial(sdpa, attn_mask=masks["window"]), batched, upstream)
    if bench.on_gpu:
        both_ways = partial(varlen, ends=real, window=(-1, -1))
        measure("both directions: varlen", both_ways, flat, flat_upstream)
        sliding = partial(varlen, ends=real, window=(window, window))
        measure("window of 64 to each side: varlen", sliding, flat, flat_upstream)


def flexible_attention(bench: Bench) -> None:
    """The same by compiled `flex_attention` with a mask of documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = bench.shape
    window = 64
    ids = document_ids(document_starts(packed_lengths(shape, shape.rows), shape.length), shape).to(bench.device)
    options = {"device": bench.device, "dtype": torch.bfloat16}
    sizes = (shape.rows, shape.heads, shape.length, shape.head_dim)
    inputs = [torch.randn(sizes, **options).requires_grad_() for _ in range(3)]
    upstream = torch.randn(sizes, **options)
    flex = bench.compiled(flex_attention, dynamic=False)
    make_mask = bench.compiled(create_block_mask, dynamic=False)
    rules = {
        "causal": lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k),
        "both directions": lambda b, h, q, k: ids[b, q] == ids[b, k],
        "window of 64 to each side": lambda b, h, q, k: (ids[b, q] == ids[b, k]) & ((q - k).abs() <= window),
    }
    for name, rule in rules.items():
        arguments = (rule, shape.rows, None, shape.length, shape.length)
        block = make_mask(*arguments, device=bench.device)
        if name == "causal":
            ms = bench.milliseconds(lambda a=arguments: make_mask(*a, device=bench.device), repeats=5)
            bench.record("causal: flex_attention, making the block mask once a step", ms=ms)
        both_passes(bench, f"{name}: flex_attention", partial(flex, block_mask=block), inputs, upstream)


def both_passes(bench: Bench, name: str, call: Callable, inputs: list, gradient: torch.Tensor) -> None:
    """Record the time of a forward pass, and of both together, with respect to those inputs that want a gradient."""
    with bench.attempt(name):
        forward = bench.milliseconds(lambda: call(*inputs))
        wanted = [value for value in inputs if value.requires_grad]

        def both():
            torch.autograd.grad(call(*inputs), wanted, gradient)

        bench.record(name, ms=bench.milliseconds(both), forward_ms=forward, extra_gb=bench.extra_gigabytes(both))


def relative_positions(bench: Bench) -> None:
    """T5's encoder, a layer: a learned bias for each distance, documents kept apart, rows of 512."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = bench.shape
    length = shape.length // 2
    options = {"device": bench.device, "dtype": torch.bfloat16}
    sizes = (shape.rows, shape.heads, length, shape.head_dim)
    inputs = [torch.randn(sizes, **options).requires_grad_() for _ in range(3)]
    upstream = torch.randn(sizes, **options)
    table = torch.randn(32, shape.heads, device=bench.device).requires_grad_()
    fixed = table.detach()
    ids = (torch.arange(length, device=bench.device) * 3 // length).expand(shape.rows, length).contiguous()
    place = torch.arange(length, device=bench.device)
    buckets = (place[None, :] - place[:, None]).abs().clamp(max=31)
    apart = (ids[:, None, :, None] != ids[:, None, None, :]) * torch.finfo(torch.bfloat16).min

    def float_mask(table):
        bias = table[buckets].permute(2, 0, 1)[None]
        return (bias + apart).to(torch.bfloat16)

    def by_mask(query, key, value, table):
        return F.scaled_dot_product_attention(query, key, value, float_mask(table), scale=1.0)

    def by_hand(query, key, value, table):
        scores = (query @ key.mT).float() + float_mask(table).float()
        return scores.softmax(-1).to(query.dtype) @ value

    def by_flex(query, key, value, table):
        def add_bias(score, b, h, q, k):
            return score + table[(k - q).abs().clamp(max=31), h]

        return flex(query, key, value, score_mod=add_bias, block_mask=block, scale=1.0)

    name = "T5's bias and documents apart"
    both_passes(bench, f"{name}: sdpa, float mask (as it is)", by_mask, [*inputs, table], upstream)
    both_passes(bench, f"{name}: sdpa, float mask, bias without gradient", by_mask, [*inputs, fixed], upstream)
    with bench.attempt(f"{name}: compiled"):
        compiled = bench.compiled(by_hand, dynamic=False)
        both_passes(bench, f"{name}: softmax by hand, compiled", compiled, [*inputs, table], upstream)
    with bench.attempt(f"{name}: flex_attention"):
        flex = bench.compiled(flex_attention, dynamic=False)
        make_mask = bench.compiled(create_block_mask, dynamic=False)
        rule = lambda b, h, q, k: ids[b, q] == ids[b, k]  # noqa: E731
        block = make_mask(rule, shape.rows, None, length, length, device=bench.device)
        both_passes(bench, f"{name}: flex_attention, bias without gradient", by_flex, [*inputs, fixed], upstream)
        both_passes(bench, f"{name}: flex_attention", by_flex, [*inputs, table], upstream)


# --- Optimizer -----------------------------------------------------------------------------------------------------


def optimizer(bench: Bench) -> None:
    """A step of the optimizer for the 124M model, what it needs beside that, and one micro-batch's memory traffic."""
    from unlabeled.models.optimizers import OptimizerFactory, orthogonalize

    model = hugging_face_model("gpt2", bench.shape).to(bench.device)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    rates = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    builds = {
        "AdamW, fused (as the recipes)": lambda: OptimizerFactory()(model, optimizer="adamw", **rates),
        "AdamW, foreach": lambda: torch.optim.AdamW(parameters, foreach=True, **rates),
        "Muon with AdamW (as the recipes)": lambda: OptimizerFactory()(model, optimizer="muon", **rates),
    }
    for name, build in builds.items():
        with bench.attempt(name):
            own = build()
            bench.record(name, ms=bench.milliseconds(own.step), extra_gb=bench.extra_gigabytes(own.step))
            del own
    with bench.attempt("clipping"):
        call = partial(nn.utils.clip_grad_norm_, parameters, 1.0)
        bench.record("clip_grad_norm_, foreach", ms=bench.milliseconds(call))
    width = bench.shape.width
    matrices = torch.randn(bench.shape.layers, width, 4 * width, device=bench.device)
    for name, call in {"eager": orthogonalize, "compiled": bench.compiled(orthogonalize, dynamic=False)}.items():
        with bench.attempt(f"orthogonalise, {name}"):
            ms = bench.milliseconds(partial(call, matrices))
            size = f"{bench.shape.layers} x {width} x {4 * width}"
            bench.record(f"orthogonalise, {size}, {name}", ms=ms)


# --- A plain loop --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x):
        rows, length, width = x.shape
        query, key, value = (
            part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm_2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    """GPT-2 in the manner of nanoGPT: whole rows, causal attention, all logits, loss inside the compiled graph."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids, labels):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def hugging_face_model(kind: str, shape: Shape, attn_implementation: str = "sdpa"):
    """GPT-2 or ModernBERT-base at a shape, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    ids = {"vocab_size": shape.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if kind == "gpt2":
        sizes = {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads, "n_positions": shape.length}
        sizes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = AutoConfig.for_model("gpt2", **ids, **sizes)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    else:
        full = shape.layers == Shape.layers
        sizes = {} if full else {"hidden_size": shape.width, "intermediate_size": 2 * shape.width}
        sizes |= {} if full else {"num_hidden_layers": 4, "num_attention_heads": shape.heads}
        ids |= {"cls_token_id": 0, "sep_token_id": 0}
        config = AutoConfig.for_model("modernbert", **ids, **sizes)
        model = AutoModelForMaskedLM.from_config(config, trust_remote_code=False, **options)
    model.config.use_cache = False
    return model


def numbered_tokens(vocabulary: int):
    """A tokenizer of `vocabulary` words, of which the first three are its end, its padding and its mask."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["<eos>", "<pad>", "<mask>", *(f"t{index}" for index in range(3, vocabulary))]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<eos>"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_collator(kind: str, model, shape: Shape, flat: bool):
    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
    from unlabeled.models.attention import sliding_window

    tokenizer = numbered_tokens(shape.vocabulary)
    if kind == "gpt2":
        return DataCollatorForPackedLanguageModeling(tokenizer, mlm=False, max_length=shape.length, flat=flat)
    options = {"mlm_probability": 0.3, "sliding_window": sliding_window(model.config)}
    return DataCollatorForPackedLanguageModeling(tokenizer, mlm=True, max_length=shape.length, flat=flat, **options)


def bound_of_documents(shape: Shape) -> int:
    """A size of `cu_seq_lens` that the batches fit into: documents of an eighth of a row on average."""
    return 8 * shape.rows + 1


def loop(
    bench: Bench, kind: str = "gpt2", attn: str = "sdpa", head: str = "as it is", lengths: str = "as made"
) -> None:
    """A whole training step in a plain loop.

    Args:
        kind: "plain" (`PlainGPT`), "gpt2" or "modernbert".
        attn: "sdpa" or "varlen".
        head: "as it is", "compiled chunks", or "in graph" (all logits and the loss compiled with the model).
        lengths: "as made" by the collator, "padded" (`cu_seq_lens` has one size), or "dynamic" (its size is marked so).
    """
    shape = bench.shape
    name = f"{kind}, {attn}{f' {lengths}' if attn == 'varlen' else ''}, head {head}"
    prepared = training(bench, kind, attn, head, lengths)
    step, batches = prepared["step"], prepared["batches"]
    begun = time.perf_counter()
    losses = [step(batches[0]), step(batches[1])]
    bench.synchronize()
    first = time.perf_counter() - begun
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host = []
    events = []
    for index in range(4 + shape.steps):
        batch = batches[(2 + index) % len(batches)]
        begun = time.perf_counter()
        if bench.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)
        losses.append(step(batch))
        host.append(time.perf_counter() - begun)
    bench.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(events)] or [1e3 * x for x in host]
    ms = statistics.median(times[4:] or times)
    flops = prepared["flops_per_token"]
    figures = {
        "ms": ms,
        "slowest_ms": max(times[4:] or times),
        "tokens_per_second": 1e3 * shape.tokens / ms,
        "mfu": mfu(bench, flops * shape.tokens / ms * 1e3),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if bench.on_gpu else None,
        "first_two_steps_s": first,
        "compilations": len(compilations()),
        "loss": float(losses[-1]),
        "first_loss": float(losses[0]),
    }
    bench.record(name, **figures, reasons=[entry["reason"] for entry in compilations() if entry["reason"]])
    if bench.on_gpu:
        with bench.attempt(f"{name}: profile"):
            profile(bench, name, lambda: step(batches[0]))


def training(bench: Bench, kind: str, attn: str, head: str, lengths: str, count: int = 4) -> dict:
    """A model, its batches and a function that trains on one of them."""
    from unlabeled.models.losses import ChunkedLinearCrossEntropy
    from unlabeled.models.optimizers import OptimizerFactory
    from unlabeled.planning import count_parameters, training_flops_per_token

    shape = bench.shape
    add_missing_grouped_heads()
    model = PlainGPT(shape) if kind == "plain" else hugging_face_model(kind, shape, attn)
    model.to(bench.device).train()
    counted = hugging_face_model("gpt2", shape) if kind == "plain" else model
    share = 0.3 if kind == "modernbert" else 1.0
    flops = training_flops_per_token(counted.config, count_parameters(counted), shape.length, head_share=share)
    collator = make_collator("gpt2" if kind == "plain" else kind, counted, shape, flat=attn == "varlen")
    rows = Rows(shape, count * shape.rows, shape.vocabulary)
    batches = []
    for index in range(count):
        batch = dict(collator([rows[place] for place in range(index * shape.rows, (index + 1) * shape.rows)]))
        if lengths == "padded":
            for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
                real = batch[key].unique()
                batch[key] = padded_starts(real, bound_of_documents(shape))
        batches.append(pinned(batch) if bench.on_gpu else batch)
    shift = kind == "gpt2"
    if kind == "plain":
        own_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    else:
        rates = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        own_optimizer = OptimizerFactory()(model, optimizer="adamw", **rates)
    loss_function = None
    if kind != "plain" and head != "in graph":  # its hooks make the model return its last hidden states
        loss_function = ChunkedLinearCrossEntropy(model, shift=shift, target_share=share)
    body = bench.compiled(chunk_gradients, dynamic=False) if head == "compiled chunks" else None
    run = bench.compiled(model)
    autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=True)
    room = -(-int(max((batch["labels"] != IGNORE).sum() for batch in batches)) // 256) * 256

    def shifted(labels):
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE) if shift else labels

    def loss_in_graph(batch, labels):
        logits = model(**batch).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), shifted(labels).flatten(), ignore_index=IGNORE)

    run_with_loss = bench.compiled(loss_in_graph) if head == "in graph" and kind != "plain" else None

    def loss_of(batch, labels):
        if kind == "plain":
            return run(batch["input_ids"], F.pad(labels[:, 1:], (0, 1), value=IGNORE))
        if run_with_loss is not None:
            return run_with_loss(batch, labels)
        outputs = run(**batch)
        targets = (labels != IGNORE).sum()
        if head == "as it is":
            return loss_function(outputs, labels, targets)
        hidden = outputs.last_hidden_state.flatten(0, 1).to(torch.bfloat16)
        own = shifted(labels).flatten()
        if share < 1:
            places = torch.nonzero_static(own != IGNORE, size=room, fill_value=-1)[:, 0]
            hidden = hidden[places.clamp(min=0)]
            own = own[places.clamp(min=0)].masked_fill(places < 0, IGNORE)
        weight = model.get_output_embeddings().weight
        bias = model.get_output_embeddings().bias
        if bias is not None:  # ModernBERT's; the prototype leaves its value out and keeps the cost of a column of ones
            hidden = hidden + 0.0 * bias[0].to(hidden.dtype)
        return CompiledHead.apply(hidden, own, weight, body, 8192 if bench.on_gpu else 64) / targets

    def step(batch: dict) -> torch.Tensor:
        from accelerate.utils import send_to_device

        batch = send_to_device(dict(batch), bench.device, non_blocking=True)
        labels = batch.pop("labels")
        if lengths == "dynamic":
            for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
                torch._dynamo.maybe_mark_dynamic(batch[key], 0)
        with autocast:
            loss = loss_of(batch, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        own_optimizer.step()
        own_optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return {"step": step, "batches": batches, "flops_per_token": flops, "model": model}


def pinned(value):
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    return {key: pinned(part) for key, part in value.items()} if isinstance(value, dict) else value


def mfu(bench: Bench, flops_per_second: float) -> float | None:
    """Of the datasheet's peak, as `unlabeled` counts; None where it is not known."""
    from unlabeled.planning import peak_flops

    if not bench.on_gpu:
        return None
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    return flops_per_second / peak if peak else None


def compilations() -> list[dict]:
    """Each compilation of this process: function, seconds, the reason of a repetition, and when it began."""
    from torch._dynamo.utils import get_compilation_metrics

    found = []
    for entry in get_compilation_metrics():
        if not getattr(entry, "is_forward", True) and not getattr(entry, "entire_frame_compile_time_s", None):
            continue  # a backward pass that was compiled with its forward pass
        if getattr(entry, "co_name", None) is None:
            continue
        began = getattr(entry, "start_time_us", None) or 0
        file = (entry.co_filename or "").split("site-packages/")[-1]
        found.append(
            {
                "function": f"{entry.co_name} ({file}:{entry.co_firstlineno})",
                "seconds": entry.entire_frame_compile_time_s,
                "reason": entry.recompile_reason,
                "failed": entry.fail_reason,
                "began": began / 1e6,
            }
        )
    return found


def category(kernel: str) -> str:
    name = kernel.lower()
    if "flash" in name or "fmha" in name or "attention" in name or "flex" in name or "cutlassf" in name:
        return "attention"
    if any(part in name for part in ("gemm", "cutlass", "cublas", "nvjet", "_mm_", "wgmma", "splitk")):
        return "matrix products"
    if "memcpy" in name or "memset" in name:
        return "copies"
    if "multi_tensor" in name or "adam" in name:
        return "optimizer and clipping"
    if name.startswith("triton"):
        return "compiled elementwise and reductions"
    return "eager elementwise and reductions"


def profile(bench: Bench, name: str, call: Callable, steps: int = 2) -> None:
    """Kernel time of a step by kind, and the largest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in seen.key_averages():
        ms = event.self_device_time_total / 1e3 / steps
        if ms:
            kinds[category(event.key)] = kinds.get(category(event.key), 0.0) + ms
            kernels[event.key[:90]] = kernels.get(event.key[:90], 0.0) + ms
    top = dict(sorted(kernels.items(), key=lambda item: -item[1])[:14])
    kinds = {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])}
    largest = {kernel: round(ms, 2) for kernel, ms in top.items()}
    bench.record(f"{name}: kernels", ms=math.fsum(kernels.values()), kinds=kinds, largest=largest)


# --- Compilations over many batches --------------------------------------------------------------------------------


def recompilations(bench: Bench, kind: str, lengths: str) -> None:
    """How often a model of few layers compiles over random batches with `varlen`, and why."""
    from dataclasses import replace

    if bench.on_gpu:
        shape = replace(bench.shape, rows=16, layers=2, heads=4, vocabulary=2048)
        small = replace(bench, shape=shape)
    else:
        whole_graphs_on_cpu()
        shape = replace(bench.shape, rows=8)
        small = replace(bench, shape=shape, backend="aot_eager")  # what is counted is Dynamo's
    count = 60 if bench.on_gpu else 12 if bench.compile else 3
    prepared = training(small, kind, "varlen", "as it is", lengths, count=count)
    when = []
    for index, batch in enumerate(prepared["batches"]):
        before = len(compilations())
        prepared["step"](batch)
        if len(compilations()) > before:
            when.append(index)
    sizes = sorted({len(batch["cu_seq_lens_q"]) for batch in prepared["batches"]})
    found = compilations()
    bench.record(
        f"{kind}, varlen, cu_seq_lens {lengths}",
        batches=count,
        compilations=len(found),
        at_batches=when,
        sizes=sizes,
        seconds=round(sum(entry["seconds"] or 0 for entry in found), 1),
        functions=sorted({entry["function"] for entry in found}),
        reasons=[entry["reason"] for entry in found if entry["reason"]],
    )
