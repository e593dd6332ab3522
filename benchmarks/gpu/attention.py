"""Attention of one layer over packed documents."""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, both_passes
from benchmarks.gpu.documents import document_ids, document_starts, packed_lengths, padded_starts
from unlabeled.data.attention_masks import block_mask

EMPTY_DOCUMENTS = (16, 64, 256, 1024, 2048)


def attention(bench: Bench) -> None:
    """Measure attention of one layer, forward and backward, with masks and with `varlen_attn`."""
    from torch.nn.attention.varlen import varlen_attn

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
    measure("causal: sdpa, is_causal, documents not isolated", partial(sdpa, is_causal=True), batched, upstream)

    def varlen(query, key, value, *, ends, longest=shape.length, window=(-1, 0)):
        return varlen_attn(query, key, value, ends, ends, longest, longest, window_size=window)

    if bench.on_gpu:
        real = starts.to(bench.device)
        measure("causal: varlen, real cu_seq_lens", partial(varlen, ends=real), flat, flat_upstream)
        name = "causal: varlen, real cu_seq_lens, max_length of the longest document"
        measure(name, partial(varlen, ends=real, longest=longest), flat, flat_upstream)
        row_starts = torch.arange(0, shape.tokens + 1, shape.length, dtype=torch.int32, device=bench.device)
        measure("causal: varlen, one document a row", partial(varlen, ends=row_starts), flat, flat_upstream)
        for count in EMPTY_DOCUMENTS:
            ends = padded_starts(starts, len(starts) + count).to(bench.device)
            measure(f"causal: varlen, {count:,} empty documents added", partial(varlen, ends=ends), flat, flat_upstream)
    measure("both directions: sdpa, block mask", partial(sdpa, attn_mask=masks["document"]), batched, upstream)
    measure("window of 64 to each side: sdpa, block mask", partial(sdpa, attn_mask=masks["window"]), batched, upstream)
    if bench.on_gpu:
        both_ways = partial(varlen, ends=real, window=(-1, -1))
        measure("both directions: varlen", both_ways, flat, flat_upstream)
        sliding = partial(varlen, ends=real, window=(window, window))
        measure("window of 64 to each side: varlen", sliding, flat, flat_upstream)


def flexible_attention(bench: Bench) -> None:
    """Measure attention of one layer by compiled `flex_attention` with a mask of documents."""
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
            bench.record("causal: flex_attention, making the block mask once per step", ms=ms)
        both_passes(bench, f"{name}: flex_attention", partial(flex, block_mask=block), inputs, upstream)


def relative_positions(bench: Bench) -> None:
    """Measure a layer of T5's encoder: a learned bias for each distance, isolated documents, rows of 512."""
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
    positions = torch.arange(length, device=bench.device)
    buckets = (positions[None, :] - positions[:, None]).abs().clamp(max=31)
    document_mask = (ids[:, None, :, None] != ids[:, None, None, :]) * torch.finfo(torch.bfloat16).min

    def float_mask(table):
        bias = table[buckets].permute(2, 0, 1)[None]
        return (bias + document_mask).to(torch.bfloat16)

    def by_mask(query, key, value, table):
        return F.scaled_dot_product_attention(query, key, value, float_mask(table), scale=1.0)

    def by_hand(query, key, value, table):
        scores = (query @ key.mT).float() + float_mask(table).float()
        return scores.softmax(-1).to(query.dtype) @ value

    def by_flex(query, key, value, table):
        def add_bias(score, b, h, q, k):
            return score + table[(k - q).abs().clamp(max=31), h]

        return flex(query, key, value, score_mod=add_bias, block_mask=block, scale=1.0)

    name = "T5's bias and isolated documents"
    both_passes(bench, f"{name}: sdpa, float mask (as in the recipes)", by_mask, [*inputs, table], upstream)
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
