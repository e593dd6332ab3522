"""Whole training steps in a plain loop, and how often models compile."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch.profiler import ProfilerActivity
from transformers.utils import ModelOutput

from benchmarks.gpu.bench import IGNORE, Bench, Shape, compilations, mfu
from benchmarks.gpu.documents import Rows, padded_starts
from benchmarks.gpu.head import CompiledHead, chunk_gradients
from benchmarks.gpu.models import PlainGPT, hugging_face_model, numbered_tokens
from benchmarks.gpu.varlen import add_missing_grouped_heads, whole_graphs_on_cpu
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.models.attention import sliding_window
from unlabeled.models.losses import ChunkedLinearCrossEntropy
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.planning import count_parameters, training_flops_per_token

MLM_PROBABILITY = 0.3
FIRST_STEPS = 2  # which compile
UNTIMED_STEPS = 4  # after those
LARGEST_KERNELS = 14


class TrainingLoop:
    """A model, its batches, and a step of training.

    Args:
        kind: "plain" (`PlainGPT`), "gpt2" or "modernbert".
        attn: "sdpa" or "varlen".
        head: "recipe" (`ChunkedLinearCrossEntropy`), "compiled chunks", or "in graph": all logits and the loss are
            compiled with the model.
        lengths: "unchanged" from the collator, "padded" (`cu_seq_lens` always has the same size), or "dynamic" (its
            size is marked as dynamic).
        batch_count: number of different batches.
    """

    def __init__(self, bench: Bench, kind: str, attn: str, head: str, lengths: str, batch_count: int = 4):
        add_missing_grouped_heads()
        self.bench = bench
        self.kind = kind
        self.head = head
        self.lengths = lengths
        self.shift = kind == "gpt2"
        self.head_share = MLM_PROBABILITY if kind == "modernbert" else 1.0
        shape = bench.shape
        self.model = PlainGPT(shape) if kind == "plain" else hugging_face_model(kind, shape, attn)
        self.model.to(bench.device).train()
        reference = hugging_face_model("gpt2", shape) if kind == "plain" else self.model
        self.flops_per_token = training_flops_per_token(
            reference.config, count_parameters(reference), shape.length, head_share=self.head_share
        )
        collator = make_collator(kind, reference, shape, flat=attn == "varlen")
        self.batches = self.make_batches(collator, batch_count)
        self.optimizer = self.make_optimizer()
        self.compute_loss = self.make_loss()

    def make_batches(self, collator: Callable, count: int) -> list[dict]:
        shape = self.bench.shape
        rows = Rows(shape, count * shape.rows, shape.vocabulary)
        batches = []
        for first_row in range(0, count * shape.rows, shape.rows):
            batch = dict(collator([rows[index] for index in range(first_row, first_row + shape.rows)]))
            if self.lengths == "padded":
                for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
                    batch[key] = padded_starts(batch[key].unique(), padded_size(shape))
            batches.append(pin_memory(batch) if self.bench.on_gpu else batch)
        return batches

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.kind == "plain":
            return torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        options = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        return OptimizerFactory()(self.model, optimizer="adamw", **options)

    def make_loss(self) -> Callable[[dict, torch.Tensor], torch.Tensor]:
        """A function of a batch and its labels that returns the mean loss."""
        bench = self.bench
        model = self.model
        if self.kind == "plain":
            forward = bench.compiled(model)
            return lambda batch, labels: forward(batch["input_ids"], shift_labels(labels))
        if self.head == "in graph":

            def loss_in_graph(batch: dict, labels: torch.Tensor) -> torch.Tensor:
                logits = model(**batch).logits.flatten(0, 1).float()
                return F.cross_entropy(logits, self.targets(labels).flatten(), ignore_index=IGNORE)

            return bench.compiled(loss_in_graph)
        # The hooks of this object make the model return its last hidden states instead of logits.
        self.recipe_loss = ChunkedLinearCrossEntropy(model, shift=self.shift, target_share=self.head_share)
        forward = bench.compiled(model)
        if self.head == "recipe":
            return lambda batch, labels: self.recipe_loss(forward(**batch), labels, (labels != IGNORE).sum())
        body = bench.compiled(chunk_gradients, dynamic=False)
        return lambda batch, labels: self.compiled_head_loss(forward(**batch), labels, body)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_labels(labels) if self.shift else labels

    @cached_property
    def max_targets(self) -> int:
        """The largest number of targets in a batch, rounded up to a multiple of 256."""
        counts = [int((batch["labels"] != IGNORE).sum()) for batch in self.batches]
        return math.ceil(max(counts) / 256) * 256

    def compiled_head_loss(self, outputs: ModelOutput, labels: torch.Tensor, body: Callable) -> torch.Tensor:
        """The mean loss by `CompiledHead`, for masked models at the targets only."""
        hidden = outputs.last_hidden_state.flatten(0, 1).to(torch.bfloat16)
        targets = self.targets(labels).flatten()
        if self.head_share < 1:
            positions = torch.nonzero_static(targets != IGNORE, size=self.max_targets, fill_value=-1)[:, 0]
            hidden = hidden[positions.clamp(min=0)]
            targets = targets[positions.clamp(min=0)].masked_fill(positions < 0, IGNORE)
        output_embeddings = self.model.get_output_embeddings()
        if output_embeddings.bias is not None:
            # The prototype has no bias, as ModernBERT does; this keeps the cost of one.
            hidden = hidden + 0.0 * output_embeddings.bias[0].to(hidden.dtype)
        chunk_size = 8192 if self.bench.on_gpu else 64
        nats = CompiledHead.apply(hidden, targets, output_embeddings.weight, body, chunk_size)
        return nats / (labels != IGNORE).sum()

    def step(self, batch: dict) -> torch.Tensor:
        """Train on a batch and return its loss."""
        batch = send_to_device(dict(batch), self.bench.device, non_blocking=True)
        labels = batch.pop("labels")
        if self.lengths == "dynamic":
            for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
                torch._dynamo.maybe_mark_dynamic(batch[key], 0)
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            loss = self.compute_loss(batch, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_collator(kind: str, model: torch.nn.Module, shape: Shape, flat: bool) -> Callable:
    tokenizer = numbered_tokens(shape.vocabulary)
    if kind != "modernbert":
        return DataCollatorForPackedLanguageModeling(tokenizer, mlm=False, max_length=shape.length, flat=flat)
    return DataCollatorForPackedLanguageModeling(
        tokenizer,
        mlm=True,
        max_length=shape.length,
        flat=flat,
        mlm_probability=MLM_PROBABILITY,
        sliding_window=sliding_window(model.config),
    )


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """The label of each position for a causal model: the next token."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def padded_size(shape: Shape) -> int:
    """A size of `cu_seq_lens` that all batches fit into: documents of an eighth of a row on average."""
    return 8 * shape.rows + 1


def pin_memory(value: Any) -> Any:
    """Move the tensors of a batch to pinned memory."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: pin_memory(item) for key, item in value.items()}
    return value


def loop(
    bench: Bench, kind: str = "gpt2", attn: str = "sdpa", head: str = "recipe", lengths: str = "unchanged"
) -> None:
    """Measure whole training steps; see `TrainingLoop` for the options."""
    shape = bench.shape
    name = f"{kind}, {attn} {lengths}, head {head}" if attn == "varlen" else f"{kind}, {attn}, head {head}"
    training = TrainingLoop(bench, kind, attn, head, lengths)
    batches = training.batches
    started = time.perf_counter()
    losses = [training.step(batch) for batch in batches[:FIRST_STEPS]]
    bench.synchronize()
    first_seconds = time.perf_counter() - started
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host_times = []
    events = []
    for index in range(FIRST_STEPS, FIRST_STEPS + UNTIMED_STEPS + shape.steps):
        started = time.perf_counter()
        if bench.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)
        losses.append(training.step(batches[index % len(batches)]))
        host_times.append(1e3 * (time.perf_counter() - started))
    bench.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in pairwise(events)] or host_times
    timed = milliseconds[UNTIMED_STEPS:] or milliseconds
    median = statistics.median(timed)
    entries = compilations()
    bench.record(
        name,
        ms=median,
        slowest_ms=max(timed),
        tokens_per_second=1e3 * shape.tokens / median,
        mfu=mfu(bench, training.flops_per_token * shape.tokens / median * 1e3),
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if bench.on_gpu else None,
        first_two_steps_s=first_seconds,
        compilations=len(entries),
        loss=float(losses[-1]),
        first_loss=float(losses[0]),
        reasons=[entry["reason"] for entry in entries if entry["reason"]],
    )
    if bench.on_gpu:
        with bench.attempt(f"{name}: profile"):
            profile(bench, name, lambda: training.step(batches[0]))


def kernel_category(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    if any(part in name for part in ("flash", "fmha", "attention", "flex", "cutlassf")):
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
    """Record the kernel time of a step by category, and the largest kernels."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    categories: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1e3 / steps
        if ms:
            category = kernel_category(event.key)
            kernel = event.key[:90]
            categories[category] = categories.get(category, 0.0) + ms
            kernels[kernel] = kernels.get(kernel, 0.0) + ms
    bench.record(
        f"{name}: kernels",
        ms=math.fsum(kernels.values()),
        kinds=largest(categories, len(categories)),
        largest=largest(kernels, LARGEST_KERNELS),
    )


def largest(times: dict[str, float], count: int) -> dict[str, float]:
    """The entries with the largest times, rounded."""
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {key: round(ms, 2) for key, ms in ordered[:count]}


def recompilations(bench: Bench, kind: str, lengths: str) -> None:
    """Count how often a model of few layers compiles over random batches with `varlen`, and why."""
    if bench.on_gpu:
        shape = replace(bench.shape, rows=16, layers=2, heads=4, vocabulary=2048)
        small_bench = replace(bench, shape=shape)
        batch_count = 60
    else:
        whole_graphs_on_cpu()
        shape = replace(bench.shape, rows=8)
        small_bench = replace(bench, shape=shape, backend="aot_eager")  # only Dynamo's compilations are counted
        batch_count = 12 if bench.compile else 3
    training = TrainingLoop(small_bench, kind, "varlen", "recipe", lengths, batch_count)
    compiling_batches = []
    for index, batch in enumerate(training.batches):
        count_before = len(compilations())
        training.step(batch)
        if len(compilations()) > count_before:
            compiling_batches.append(index)
    entries = compilations()
    bench.record(
        f"{kind}, varlen, cu_seq_lens {lengths}",
        batches=batch_count,
        compilations=len(entries),
        at_batches=compiling_batches,
        sizes=sorted({len(batch["cu_seq_lens_q"]) for batch in training.batches}),
        seconds=round(sum(entry["seconds"] or 0 for entry in entries), 1),
        functions=sorted({entry["function"] for entry in entries}),
        reasons=[entry["reason"] for entry in entries if entry["reason"]],
    )
