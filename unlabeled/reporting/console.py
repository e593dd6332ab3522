"""What a person sees: the plan before step 0, progress while it runs, and a stop with a reason when it goes wrong."""

import math
import sys
import time
from contextlib import contextmanager

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from unlabeled.data.files import describe_skipped
from unlabeled.errors import UserError
from unlabeled.models.optimizers import describe_coverage
from unlabeled.models.schedules import learning_rate_factor
from unlabeled.planning import (
    RunSizes,
    count_parameters,
    device_name,
    duration,
    human,
    not_calibrated,
    peak_flops,
    resident_bytes,
    run_costs,
)
from unlabeled.reporting.lineage import shown

# Compiling takes 20 to 40 s on a CPU and then saves 5 % of the time in fp32, where nearly all of it goes into matrix
# products (benchmarks/results): it pays in runs of so many FLOPs. In bf16, not measured yet, more is left to save.
CPU_COMPILE_FLOPS = {"fp32": 5e13, "bf16": 2e13}


def describe(manifest: dict) -> str:
    """The manifest in a few lines for the terminal."""
    lines = []
    for name, split in manifest["splits"].items():
        unknown = split["unknown_tokens"] / split["text_tokens"]
        lines.append(
            f"{name:<11}{split['documents']:>9,} documents {split['bytes'] / 1e6:>10,.2f} MB"
            f" {split['text_tokens']:>13,} tokens"
            f" {split['rows']:>10,} rows of {manifest['max_length']}, {split['packing_efficiency']:.2%} full"
            + (f", {unknown:.2%} of the tokens unknown to the tokenizer" if unknown else "")
            + (f", {split['targets']:,} learned" if manifest["objective"] == "sft" else "")
        )
        if split.get("left_out"):
            lines.append(f"{'':<11}left out: {describe_left_out(split)}")
        if cut := split.get("rearranged"):
            lines.append(
                f"{'':<11}{cut['documents']:>9,} documents, {cut['text_tokens'] / split['text_tokens']:.1%} of the"
                f" tokens, rearranged to fill in the middle, in {cut['pieces']:,} pieces"
            )
    lines += [f"{name}: {line}" for name, line in describe_sources(manifest).items()]
    if "target_length" in manifest:
        lines.append(
            f"a text of {manifest['raw_length']} tokens becomes {manifest['max_length']} inputs and "
            f"{manifest['target_length']} targets"
        )
    if len(manifest["sources"]) > 1:
        total = sum(source["tokens"] for source in manifest["sources"])
        lines += [
            f"  {source['tokens'] / total:>6.1%} of the tokens from {source['path']}" for source in manifest["sources"]
        ]
    if manifest["splits"].get("train", {}).get("estimated"):
        lines.append("the training text is a stream, read while it trains: its counts are guessed from its beginning")
    else:
        rate = manifest["seconds_per_million_tokens"]
        lines.append(f"prepared in {manifest['seconds']:.1f} s, {rate:.2f} s per million tokens")
    return "\n".join(lines)


LEFT_OUT_WARNING = 0.01  # share of the documents above which the plan warns


def describe_left_out(split: dict) -> str:
    """How many documents of a split are left out, by reason."""
    share = left_out_share(split)
    return f"{count_by_reason(split['left_out'])} ({share:.2%})"


def count_by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def left_out_share(split: dict) -> float:
    """The share of the documents of a split that are left out."""
    count = sum(split.get("left_out", {}).values())
    return count / max(count + split["documents"], 1)


def describe_sources(manifest: dict) -> dict[str, str]:
    """Lines on the files that are not read, and on the rows that are changed, where there are any."""
    lines = {}
    if manifest.get("skipped_files"):
        lines["not read"] = describe_skipped(manifest["skipped_files"])
    if manifest.get("repaired"):
        lines["repaired"] = ", ".join(
            f"{reason} became U+FFFD in {count:,} rows" for reason, count in manifest["repaired"].items()
        )
    return lines


def data_warnings(manifest: dict, rows_per_step: int, unit: str) -> list[str]:
    """What a person should know of the data before training."""
    train, warnings = manifest["splits"]["train"], []
    if train["rows"] < rows_per_step:
        warnings.append(
            f"the text fills {train['rows']} rows and a batch takes {rows_per_step}: each batch repeats the text "
            f"{rows_per_step / train['rows']:.1f} times; add text, or lower batch_{unit}"
        )
    documents = "documents" if unit == "tokens" else unit
    for name, split in manifest["splits"].items():
        if left_out_share(split) > LEFT_OUT_WARNING:
            warnings.append(
                f"{left_out_share(split):.1%} of the {name} {documents} are left out: "
                f"{count_by_reason(split['left_out'])}"
            )
    return warnings


def make_plan(model, args, manifest: dict, isolation: str, parent: str | None, head_share: float | None = None) -> dict:
    """Everything that follows from the arguments, as numbers (for lineage.json) and lines (for the terminal).

    `head_share` is the share of the positions at which the output head is computed, None for all their logits.
    """
    args.check_epochs(manifest["splits"]["train"])
    counts = count_parameters(model)
    warmup = args.get_warmup_steps(args.max_steps)
    try:  # Trainer builds it so late that the folder would be claimed already
        learning_rate_factor(args, args.max_steps)
    except (TypeError, ValueError) as error:
        name = args.lr_scheduler_type.value
        raise UserError(f"lr_scheduler_type {name}: {error}; correct lr_scheduler_kwargs") from error
    adapted = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    pairs, packed = args.unit == "pairs", args.unit == "tokens"
    one, amount = "rows" if packed else args.unit, getattr(args, f"batch_{args.unit}")
    stage = args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] if args.deepspeed_plugin else 0
    precision = "bf16" if args.bf16 else "fp32"
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    sizes = RunSizes(
        train_tokens=args.train_tokens,
        max_length=args.max_length,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        trainable=trained,
        optimizer=args.optimizer,
        precision=precision,
        world_size=args.world_size,
        zero_stage=stage,
        attn_implementation=model.config._attn_implementation,
        activation_checkpointing=bool(args.activation_checkpointing),
        target_length=manifest.get("target_length", 0),
        pairs=pairs,
        reference=pairs and not getattr(args, "precompute_ref_log_probs", True),
        embeds_twice=getattr(args, "embeds_twice", False),
        adapted=adapted,
        head_share=head_share,
        device=args.device.type,
        objective=manifest.get("objective", "clm"),
        streamed=bool(manifest["splits"]["train"].get("estimated")),
    )
    try:
        costs = run_costs(counts, model.config, sizes)
    except (ValueError, AttributeError) as error:
        raise UserError(f"model_type {model.config.model_type} is not supported: {error}; choose another") from error
    flops, memory, checkpoint = costs.flops, costs.memory, costs.checkpoint_bytes
    if args.compile == "auto":
        long_enough = flops >= CPU_COMPILE_FLOPS[precision]
        args.torch_compile = long_enough if args.use_cpu else args.device.type == "cuda"
    else:
        args.torch_compile = args.compile == "true"
    if not args.torch_compile:  # a backend alone would make Trainer compile
        args.torch_compile_backend = None
        args.torch_compile_mode = None
    elif args.torch_compile_backend is None:
        args.torch_compile_backend = "inductor"
    weights = 4 * counts.total // (args.world_size if stage == 3 else 1)  # which are there already
    before = 0 if args.device.type == "cuda" else resident_bytes() - weights
    doubt = not_calibrated(sizes, args.torch_compile)
    train = manifest["splits"]["train"]
    device = device_name(args.device)
    peak = peak_flops(device, precision)
    lines = {
        "model": f"{type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__}, "
        + (f"continued from {parent}" if parent else "from scratch")
        + (f", an adapter of {trained / counts.total:.2%} of the parameters" if adapted else ""),
        "parameters": f"{counts.total:,} (embedding {counts.embedding:,}, matmul {counts.matmul:,})",
        "text": ("about " if train.get("estimated") else "")
        + f"{train['text_tokens']:,} tokens in {train['documents']:,} {'documents' if packed else args.unit}"
        + (f", rows {train['packing_efficiency']:.2%} full" if packed else ""),
        "budget": ("" if packed else f"{getattr(args, f'train_{args.unit}'):,} {args.unit}, ")
        + f"{args.train_tokens:,} tokens = {args.max_steps * args.rows_per_step / train['rows']:.2f} epochs"
        f" = {args.train_tokens / counts.total:.1f} per parameter, {human(flops)} FLOPs",
        "batch": f"{amount:,} {args.unit}" + f" = {args.world_size} process{'es' if args.world_size > 1 else ''}"
        f" x {args.per_device_train_batch_size} {one}"
        f" x {args.gradient_accumulation_steps} accumulated"
        + (f" x {args.max_length} tokens" if packed else "")
        + f", {args.max_steps:,} steps",
        "schedule": f"{args.lr_scheduler_type.value}, {warmup} steps warm-up"
        + (
            f", {args.lr_scheduler_kwargs['num_decay_steps']} steps decay"
            if "num_decay_steps" in (args.lr_scheduler_kwargs or {})
            else ""
        ),
        "optimizer": describe_coverage(model, args.optimizer) + (f", ZeRO-{stage}" if stage else ""),
        "device": f"{device}, {precision}, {'compiled' if args.torch_compile else 'not compiled'},"
        f" attention {model.config._attn_implementation}",
        "isolation": isolation,
        "memory": f"about {sum(memory.values()) / 1e9:.2f} GB a process{f' ({doubt})' if doubt else ''},"
        f" checkpoint {checkpoint / 1e9:.2f} GB" + ("" if peak else ", no MFU: the peak of the device is not known"),
    }
    if not packed:  # `describe` has told it otherwise
        left_out = [
            f"{name} {describe_left_out(split)}" for name, split in manifest["splits"].items() if split.get("left_out")
        ]
        if left_out:
            lines["left out"] = "; ".join(left_out)
        lines |= describe_sources(manifest)
    if warnings := data_warnings(manifest, args.rows_per_step, args.unit):
        lines["WARNING"] = warnings
    return {
        "lines": lines,
        "parameters": counts.total,
        "embedding_parameters": counts.embedding,
        "matmul_parameters": counts.matmul,
        "flops": flops,
        "flops_per_token": flops / args.train_tokens,
        "peak_flops": peak,
        "device": device,
        "precision": precision,
        "compiled": args.torch_compile,
        "world_size": args.world_size,
        "zero_stage": stage,
        "memory_estimate": memory,
        "memory_before": before,
        "memory_by_micro_batch": {
            size: sum(estimate.values()) + before for size, estimate in costs.memory_by_micro_batch.items()
        },
        "trainable_parameters": trained,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": (kept_checkpoints(args, train["rows"]) + 1) * checkpoint,  # one is written aside
    }


def kept_checkpoints(args, rows: int) -> int:
    """The most checkpoints that lie in the output folder at a time; `rows` are those of an epoch."""
    saves = 1  # at the end
    if args.save_strategy == "steps" and args.save_steps:
        share = args.save_steps / args.max_steps if args.save_steps >= 1 else args.save_steps
        saves = math.ceil(1 / share)
    if args.save_strategy == "epoch":
        saves = math.ceil(args.max_steps * args.rows_per_step / rows)
    best = int(args.load_best_model_at_end)  # is kept beside the last one
    return min(saves, (args.save_total_limit or saves) + best)


def print_plan(plan: dict) -> None:
    for name, lines in plan["lines"].items():
        for line in [lines] if isinstance(lines, str) else lines:
            print(f"  {name:<11}{line}")
    sys.stdout.flush()


class Stopwatch:
    """Seconds of training, over interruptions: compiling and loading count, evaluation and saving do not."""

    def __init__(self):
        self.before, self.started = 0.0, None
        self.elsewhere: dict[str, float] = {}  # seconds of what it was stopped for, of this process

    def start(self, before: float = 0.0) -> None:
        self.before, self.started = before, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.started if self.started is not None else 0.0)

    @contextmanager
    def paused(self, reason: str):
        running, begun = self.started is not None, time.perf_counter()
        self.before, self.started = self.seconds, None
        yield
        now = time.perf_counter()
        self.elsewhere[reason] = self.elsewhere.get(reason, 0.0) + now - begun
        self.started = now if running else None


class Progress(TrainerCallback):
    """A bar with loss, tokens per second, MFU and time left, or a line at each log where there is no terminal."""

    FIRST_STEPS = 20  # timed for the expected duration, after as many to warm up and compile

    def __init__(self, trainer, plan: dict):
        disable_progress_bar()  # of saving and loading, which take less time than it takes to read them
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        self.trainer, self.plan, self.bar, self.mark = trainer, plan, None, None
        self.is_shown = True
        self.expected_seconds: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        before = next((e["train_seconds"] for e in reversed(state.log_history) if "train_seconds" in e), 0.0)
        self.trainer.stopwatch.start(before)
        self.last, self.first_step = (state.global_step, before), state.global_step
        self.is_shown = state.is_local_process_zero if args.log_on_each_node else state.is_world_process_zero
        if self.is_shown and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            control.should_log = True  # so that a NaN stops the run before it is saved
        if self.bar:
            self.bar.update(1)
        if (
            self.expected_seconds is None
            and self.mark is None
            and state.global_step >= self.first_step + self.FIRST_STEPS
        ):
            self.mark = (state.global_step, self.trainer.stopwatch.seconds)
        elif self.expected_seconds is None and self.mark and state.global_step == self.mark[0] + self.FIRST_STEPS:
            now = self.trainer.stopwatch.seconds
            pace = (now - self.mark[1]) / self.FIRST_STEPS
            self.expected_seconds = now + pace * (state.max_steps - state.global_step)
            self._say(state, f"expected: {duration(self.expected_seconds)} of training for {state.max_steps:,} steps")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs and "eval_loss" not in logs:
            return
        parts = [f"step {state.global_step:>6,}/{state.max_steps:,}", f"{human(logs['tokens']):>6} tokens"]
        if "loss" in logs:
            seconds = logs["train_seconds"] - self.last[1]
            speed = (state.global_step - self.last[0]) * args.batch_tokens / max(seconds, 1e-9)
            self.last = (state.global_step, logs["train_seconds"])
            parts += [f"loss {logs['loss']:.4f}", f"{speed:,.0f} tokens/s"]
            if self.plan["peak_flops"]:
                parts.append(
                    f"MFU {speed * self.plan['flops_per_token'] / self.plan['peak_flops'] / args.world_size:.1%}"
                )
            left = (state.max_steps - state.global_step) * args.batch_tokens / speed
            parts.append(f"{duration(left)} left")
            if self.bar:
                self.bar.set_postfix_str(", ".join(parts[2:-1]))
                return
        else:
            parts.append(f"held-out loss {logs['eval_loss']:.4f}")
            if "bits_per_byte" in logs:
                parts.append(f"{logs['bits_per_byte']:.4f} bits per byte")
            if "preference_accuracy" in logs:
                parts += [f"{logs['preference_accuracy']:.1%} preferred", f"reward margin {logs['reward_margin']:.3f}"]
            for key in ("eval_accuracy", "eval_f1", "eval_spearmanr", "accuracy_at_1", "mrr"):
                if key in logs:
                    parts.append(f"{key.removeprefix('eval_')} {logs[key]:.4f}")
        self._say(state, "  ".join(parts))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()

    def _say(self, state, line: str) -> None:
        if self.is_shown:
            tqdm.write(line)
            sys.stdout.flush()


def summary(objective: str, metrics: dict) -> str:
    """What a run has reached, in one line: the figures that it has."""
    aside, parts = f"unigram entropy {metrics.get('unigram_entropy', 0):.4f}" * ("unigram_entropy" in metrics), []
    for name, value, was in shown(objective, {k: v for k, v in metrics.items() if k != "unigram_entropy"}):
        loss = name.startswith("loss (")
        before, name = f"before {was}" if was else aside * loss, "held-out loss" if loss else name
        said = f"{value} {name}" if name == "bits per byte" else f"{name} {value}"
        parts.append(said + (f" ({before})" if before else ""))
    return ", ".join(parts)
