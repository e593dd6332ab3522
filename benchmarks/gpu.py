"""What a GPU is worth with these recipes, and what each part of a step costs: pieces, loops, whole recipes.

    python -m benchmarks.gpu --output results                    # at most nine minutes on an H100
    python -m benchmarks.gpu --output results --only head loop   # sections of these names
    python -m benchmarks.gpu --output results --device cpu --small --minutes 2   # does it run at all?

Nothing is fetched. Each piece runs in a process of its own with a time limit, the most important ones first, and what
it found is written at once: `results.md` (tables), `results.json` (everything) and `logs/` in the output folder. A
piece that fails leaves its error there and the next one begins. It needs torch 2.11 or newer; fine-tuning needs TRL.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before the fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

SECTIONS = ("machine", "head", "attention", "optimizer", "compilations", "loop", "recipe", "stock", "resume")
WARM_UP = 6  # steps of a recipe that are not timed
WATCHED = 8  # steps, the last ones, in which calls that wait for the GPU are counted


@dataclass(frozen=True)
class Piece:
    """Something to measure: `call(bench)` in a process of its own."""

    section: str
    name: str
    call: Callable
    seconds: float = 60.0  # its limit
    needs: tuple[str, ...] = field(default=())  # modules


class Enough(BaseException):
    """A run has made the steps that it was started for; not an error, so nothing on the way may catch it."""


# --- Whole recipes -------------------------------------------------------------------------------------------------


def make_text(folder: Path, small: bool) -> None:
    """Text, conversations and preferences of made-up words, tokenizers and a model to fine-tune, unless there."""
    import numpy as np

    from benchmarks.gpu_pieces import document_lengths
    from unlabeled.data.tokenizer_training import train_tokenizer

    if (folder / "made").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    weights = 1 / np.arange(3, 29)
    weights /= weights.sum()
    words = ["".join(rng.choice(letters, rng.integers(2, 9), p=weights)) for _ in range(3_000)]
    words = np.array(sorted(set(words)))
    chances = 1 / np.arange(10, 10 + len(words))
    chances /= chances.sum()

    def sentence(length: int) -> str:
        return " ".join(rng.choice(words, max(length, 1), p=chances))

    lengths = document_lengths(rng, 60 if small else 3_000)  # in tokens, of which a word has about 1.4
    if small:
        lengths = lengths // 8 + 4
    texts = [sentence(length * 3 // 4) for length in lengths]
    for name, part in {"train": texts, "validation": texts[: len(texts) // 30 + 2]}.items():
        lines = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    turns = []
    pairs = []
    for length in document_lengths(rng, 40 if small else 1_500) // 8 + 2:
        asked = sentence(int(length) // 3)
        answers = [sentence(int(length)), sentence(int(length))]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answers[0]}]
        turns.append(json.dumps({"messages": messages}))
        pairs.append(json.dumps({"prompt": asked, "chosen": answers[0], "rejected": answers[1]}))
    (folder / "turns.jsonl").write_text("\n".join(turns), encoding="utf-8")
    (folder / "pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    size = 600 if small else 4096
    for algorithm in ("bpe", "wordpiece", "unigram"):
        own = min(size, 600) if algorithm == "unigram" else size  # it is slow to train
        train_tokenizer(texts[:300], algorithm, own).save_pretrained(folder / algorithm)
    (folder / "made").touch()


def make_parent(folder: Path, small: bool) -> None:
    """A Llama of SmolLM2-135M's shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "parent" / "config.json").exists():
        return
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048}
    if small:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 640}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **sizes, **ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(folder / "parent")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder / "bpe", trust_remote_code=False).save_pretrained(folder / "parent")


@dataclass(frozen=True)
class Recipe:
    """A shipped configuration, with text of the benchmark's own."""

    config: str  # in recipes/configs
    algorithm: str  # of the tokenizer
    rows: int
    steps: int
    vocabulary: int = 50304
    options: tuple[str, ...] = ()

    @property
    def script(self) -> str:
        return self.config.split("/")[1].removesuffix("_lora")

    @property
    def objective(self) -> str:
        return self.script.removeprefix("pretrain_")


RECIPES = {
    "gpt2-124m": Recipe("gpt2-124m/pretrain_clm", "bpe", 64, 50),
    "modernbert-base": Recipe("modernbert-base/pretrain_mlm", "wordpiece", 64, 50, 50368),
    "t5-base": Recipe("t5-base/pretrain_span", "unigram", 64, 18, 32128),
    "smollm2-135m-sft": Recipe("smollm2-135m/sft_lora", "bpe", 8, 30),
    "smollm2-135m-dpo": Recipe("smollm2-135m/dpo_lora", "bpe", 8, 30),
}
SMALL_SIZES = {
    "gpt2-124m": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
                  "resid_pdrop": 0.0},
    "modernbert-base": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5-base": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
                "dropout_rate": 0.0},
}  # fmt: skip


def command_of(name: str, folder: Path, output: Path, small: bool, steps: int, on_gpu: bool, **changes) -> list[str]:
    """The command line of a recipe, without the program."""
    import yaml

    recipe = RECIPES[name]
    shipped = yaml.safe_load((ROOT / f"recipes/configs/{recipe.config}.yaml").read_text(encoding="utf-8"))
    length = 64 if small else shipped["max_length"]
    rows = 4 if small else recipe.rows
    options = {"output_dir": output, "max_length": length, "per_device_train_batch_size": rows}
    options |= {"logging_steps": 1000, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    options |= {"disable_tqdm": "true", "dataloader_num_workers": 0 if small else 4}
    options |= {"train_data": folder / "train.jsonl", "eval_data": folder / "validation.jsonl", "eval_fraction": 0}
    options |= {"prepared_dir": folder / "prepared"}
    if "pretrain" in recipe.config:
        options |= {"tokenizer_name_or_path": folder / recipe.algorithm, "warmup_steps": 0, "max_tokens": 10**9}
        sizes = SMALL_SIZES[name] if small else shipped.get("config_overrides", {}) | {"vocab_size": recipe.vocabulary}
        options |= {"config_overrides": json.dumps(sizes)}
    else:
        kind = "turns" if "sft" in name else "pairs"
        options |= {"model_name_or_path": folder / "parent", "eval_on_start": "false"}
        options |= {"train_data": folder / f"{kind}.jsonl", "eval_data": folder / f"{kind}.jsonl"}
        options |= {"chat_template": ROOT / "recipes/templates/chatml.jinja"}
        options.pop("eval_fraction")
    if name.endswith("dpo"):
        options |= {"train_pairs": rows * steps, "batch_pairs": rows}
    else:
        options |= {"train_tokens": rows * length * steps, "batch_tokens": rows * length}
    if not on_gpu:
        options |= {"compile": "false", "use_cpu": "true", "precision": "fp32"}
    elif "pretrain" in recipe.config:
        options |= {"compile": "true"}  # a run of real length pays for it, and so `auto` would choose it
    options |= changes
    known = [f"--{key}={value}" for key, value in options.items()]
    return ["--config", str(ROOT / f"recipes/configs/{recipe.config}.yaml"), *known, *recipe.options]


class StepTimes:
    """A callback's data: when each step ended, on the device; compilations; calls that waited."""

    def __init__(self, on_gpu: bool, steps: int, seconds: float):
        self.on_gpu = on_gpu
        self.steps = steps
        self.begun = time.monotonic()
        self.until = self.begun + 0.85 * seconds  # so that something is left of a run that its limit would end
        self.ends: list = []
        self.host: list[float] = []
        self.waits: Counter = Counter()
        self.model = None
        self.batch_tokens = 0
        self.peak = None

    def step_is_over(self, step: int) -> None:
        import torch

        self.host.append(time.time())
        if step in (1, 2, 5, 10):
            print(f"step {step} ended {time.monotonic() - self.begun:.1f} s after the start", flush=True)
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
            if step == self.steps - WATCHED:
                torch.cuda.synchronize()
                self.peak = torch.cuda.max_memory_allocated() / 1e9
                warnings.showwarning = self._count
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
        if step >= self.steps or time.monotonic() > self.until:
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            raise Enough

    def _count(self, message, *args, **kwargs) -> None:
        if "synchroniz" in str(message):
            self.waits[origin_of_call()] += 1

    def milliseconds(self) -> list[float]:
        if self.on_gpu:
            return [first.elapsed_time(second) for first, second in pairwise(self.ends)]
        return [1e3 * (second - first) for first, second in pairwise(self.host)]


def origin_of_call() -> str:
    """Where in the project, else in transformers or accelerate, the present call comes from: three frames."""
    frames = []
    for frame in reversed(traceback.extract_stack()):
        if frame.filename == __file__ or "/warnings.py" in frame.filename:
            continue
        short = frame.filename.replace(f"{ROOT}/", "").split("site-packages/")[-1]
        frames.append(f"{short}:{frame.lineno} {frame.name}: {(frame.line or '').strip()[:70]}")
        if len(frames) == 6 or short.startswith(("unlabeled", "recipes")):
            break
    own = [frame for frame in frames if frame.startswith(("unlabeled", "transformers", "accelerate", "torch/utils"))]
    return " <- ".join([frames[0], *[frame for frame in own if frame != frames[0]]][:4])


def add_callback(times: StepTimes) -> None:
    """Let every `Trainer` of this process call `times` at the end of a step."""
    import transformers.trainer
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            times.model = model
            times.batch_tokens = getattr(args, "batch_tokens", None) or times.batch_tokens
            times.step_is_over(state.global_step)

    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)


def record_steps(bench, name: str, times: StepTimes, length: int, share: float = 1.0, target_length: int = 0) -> None:
    """Figures of a run: the median step, each stall, compilations with their reasons, calls that wait."""
    from benchmarks.gpu_pieces import compilations, mfu
    from unlabeled.planning import count_parameters, training_flops_per_token

    steps = times.milliseconds()
    timed = steps[WARM_UP : len(steps) - WATCHED] if bench.on_gpu else steps
    found = compilations()
    if not timed:
        bench.record(f"{name}: note", note=f"time ended it after {len(steps) + 1} steps, the last three are timed")
        timed = steps[-3:]
    ms = statistics.median(timed)
    tokens_per_second = 1e3 * times.batch_tokens / ms
    figures = {"ms": ms, "tokens_per_second": tokens_per_second, "peak_gb": times.peak, "steps": len(steps) + 1}
    with contextlib.suppress(Exception):  # an adapter's model, say
        model = getattr(times.model, "_orig_mod", times.model)
        counts = count_parameters(model)
        options = {"head_share": share, "target_length": target_length}
        flops = training_flops_per_token(model.config, counts, length, **options)
        figures["mfu"] = mfu(bench, flops * tokens_per_second)
    stalls = {index + 2: round(step) for index, step in enumerate(steps) if step > 3 * ms}
    figures["stalls_ms_by_step"] = stalls
    figures["mean_ms_with_stalls"] = statistics.mean(timed)
    figures["compilations"] = len(found)
    figures["compiling_s"] = round(sum(entry["seconds"] or 0 for entry in found), 1)
    when = [
        f"during step {1 + sum(end < entry['began'] for end in times.host)}, {entry['seconds'] or 0:.1f} s: "
        f"{entry['function']}: {entry['reason'] or 'first time'}"
        for entry in found
    ]
    figures["compiled"] = when
    figures["waits_per_step"] = round(sum(times.waits.values()) / WATCHED, 2)
    figures["waits"] = {where: round(count / WATCHED, 2) for where, count in times.waits.most_common(12)}
    bench.record(name, **figures)


def recipe(bench, name: str, folder: Path, small: bool, **changes) -> None:
    """A recipe as it is shipped, for some steps."""
    import runpy

    from transformers import set_seed

    from benchmarks.gpu_pieces import add_missing_grouped_heads

    make_text(folder, small)
    if "pretrain" not in RECIPES[name].config:
        make_parent(folder, small)
    set_seed(0)
    steps = RECIPES[name].steps
    if small:
        steps = 20 if bench.on_gpu else 4
    label = ", ".join([name, *(f"{key} {value}" for key, value in changes.items())])
    if note := add_missing_grouped_heads():
        bench.record(f"{label}: note", note=note)
    times = StepTimes(bench.on_gpu, steps, bench.seconds)
    times.batch_tokens = RECIPES[name].rows  # of DPO: pairs, where it has no count of tokens
    add_callback(times)
    output = folder / "runs" / label.replace(", ", "_").replace(" ", "_")
    shutil.rmtree(output, ignore_errors=True)  # a recipe would go on with it
    script = ROOT / "recipes" / f"{RECIPES[name].script}.py"
    command = command_of(name, folder, output, small, steps, bench.on_gpu, **changes)
    sys.argv = [str(script), *command]
    print("command:", *sys.argv, flush=True)
    with contextlib.suppress(Enough):
        runpy.run_path(str(script), run_name="__main__")
    length = int(next(word for word in reversed(command) if word.startswith("--max_length=")).split("=")[1])
    share = 0.3 if "mlm" in RECIPES[name].config else 1.0
    record_steps(bench, label, times, length, share, target_length=114 if "span" in RECIPES[name].config else 0)


def stock(bench, name: str, folder: Path, small: bool) -> None:
    """The same model with `Trainer` as its documentation has it, bf16 and torch_compile; whole rows, no documents."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForSeq2SeqLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        default_data_collator,
    )

    from benchmarks.gpu_pieces import hugging_face_model

    shape = bench.shape
    steps = 4 if small else min(RECIPES[name].steps, 30)
    rows = shape.rows
    generator = torch.Generator().manual_seed(0)
    length = shape.length
    collator = default_data_collator
    share = 1.0
    targets = 0
    if name == "t5-base":
        length = shape.length // 2
        targets = 114 if not small else 16
        sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12}
        sizes |= {"num_heads": 12, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
        sizes = SMALL_SIZES[name] if small else sizes
        config = AutoConfig.for_model("t5", vocab_size=RECIPES[name].vocabulary, decoder_start_token_id=0, **sizes)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.config.use_cache = False
    else:
        from transformers import AutoTokenizer

        kind = name.split("-")[0]
        model = hugging_face_model(kind, shape)
        make_text(folder, small)
        tokenizer = AutoTokenizer.from_pretrained(folder / RECIPES[name].algorithm, trust_remote_code=False)
        masked = {"mlm": True, "mlm_probability": 0.3} if kind == "modernbert" else {"mlm": False}
        share = masked.get("mlm_probability", 1.0)
        collator = DataCollatorForLanguageModeling(tokenizer, **masked)
    ids = torch.randint(8, 500 if small else 4000, (rows * steps, length), generator=generator)
    labels = torch.randint(8, 500, (rows * steps, max(targets, 1)), generator=generator)

    class Blocks(torch.utils.data.Dataset):
        def __len__(self):
            return len(ids)

        def __getitem__(self, index):
            example = {"input_ids": ids[index].tolist(), "attention_mask": [1] * length}
            return example | {"labels": labels[index].tolist()} if targets else example

    times = StepTimes(bench.on_gpu, steps, bench.seconds)
    times.batch_tokens = rows * length
    add_callback(times)
    speed = {"bf16": bench.on_gpu, "torch_compile": bench.on_gpu, "use_cpu": not bench.on_gpu}
    args = TrainingArguments(
        output_dir=str(folder / "runs" / f"stock-{name}"),
        per_device_train_batch_size=rows,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
        dataloader_num_workers=0 if small else 4,
        **speed,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Blocks(), data_collator=collator)
    with contextlib.suppress(Enough):
        trainer.train()
    # It computes the head everywhere; the FLOPs that count are those that ours needs.
    record_steps(bench, f"{name}, stock Trainer, bf16, torch_compile", times, length, share, target_length=targets)


def resume(bench, folder: Path, small: bool) -> None:
    """A causal and a masked run, uninterrupted and stopped half way, with deterministic kernels: the same weights?"""
    make_text(folder, small)
    shutil.rmtree(folder / "resume", ignore_errors=True)
    for name in ("gpt2-124m", "modernbert-base"):
        folders = {variant: folder / "resume" / f"{name}-{variant}" for variant in ("whole", "stopped", "again")}
        small_run(name, folder, folders["whole"], None, bench.on_gpu)
        small_run(name, folder, folders["stopped"], 10, bench.on_gpu)
        small_run(name, folder, folders["stopped"], None, bench.on_gpu)
        same, largest = difference_of_weights(folders["whole"], folders["stopped"])
        figures = {"equal_bit_for_bit": same, "largest_difference": largest}
        if not same:  # is it the resuming, or would any second run differ?
            small_run(name, folder, folders["again"], None, bench.on_gpu)
            figures["largest_difference_of_two_whole_runs"] = difference_of_weights(folders["whole"], folders["again"])[
                1
            ]
        bench.record(f"{name}, small: uninterrupted, and stopped after 10 of 20 steps", **figures)


def difference_of_weights(one: Path, two: Path) -> tuple[bool, float]:
    """Whether the weights of two runs are the same bit for bit, and their largest difference."""
    import torch
    from safetensors.torch import load_file

    first = load_file(one / "model.safetensors")
    second = load_file(two / "model.safetensors")
    same = all(torch.equal(first[name], second[name]) for name in first)
    return same, max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def small_run(name: str, folder: Path, output: Path, stop: int | None, on_gpu: bool) -> None:
    """`resumable` in a process of its own."""
    arguments = (name, folder, output, stop, on_gpu)
    child = multiprocessing.get_context("fork").Process(target=resumable, args=arguments)
    child.start()
    child.join()
    if child.exitcode != (0 if stop is None else 75):
        raise RuntimeError(f"{output.name} ended with status {child.exitcode}, see the log")


def resumable(name: str, folder: Path, output: Path, stop: int | None, on_gpu: bool) -> None:
    """20 steps of a small run; at step `stop` it gets the signal that Slurm sends."""
    import runpy

    import torch
    import transformers.trainer
    from transformers import GenerationMixin, TrainerCallback

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if stop is not None and state.global_step == stop - 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    transformers.trainer.DEFAULT_CALLBACKS.append(Stop)
    GenerationMixin.generate = lambda self, ids, **options: ids  # samples take longer than all the rest
    command = command_of(name, folder, output, True, 20, on_gpu, compile="false")
    script = ROOT / "recipes" / f"{RECIPES[name].script}.py"
    sys.argv = [str(script), *command]
    status = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status or 0)


# --- Pieces, in the order of their importance ------------------------------------------------------------------------


def all_pieces(folder: Path, small: bool) -> list[Piece]:
    from benchmarks import gpu_pieces as pieces

    def loop(name: str, seconds: float = 75, **options) -> Piece:
        return Piece("loop", name, partial(pieces.loop, **options), seconds)

    def whole(name: str, seconds: float = 90, **changes) -> Piece:
        label = " ".join([name, *changes.values()])
        needs = ("trl",) if "smollm2" in name else ()
        return Piece("recipe", label, partial(recipe, name=name, folder=folder, small=small, **changes), seconds, needs)

    def beside(name: str, seconds: float = 75) -> Piece:
        return Piece("stock", f"stock {name}", partial(stock, name=name, folder=folder, small=small), seconds)

    varlen = {"attn_implementation": "varlen"}
    both = {"attn": "varlen", "head": "compiled chunks"}
    return [
        Piece("machine", "machine", pieces.machine, 30),
        Piece("head", "head", pieces.head, 60),
        Piece("attention", "attention", pieces.attention, 40),
        loop("nanoGPT's manner", kind="plain"),
        loop("as it is", kind="gpt2"),
        loop("varlen, compiled head", kind="gpt2", **both, lengths="dynamic"),
        *[
            Piece(
                "compilations",
                f"{kind} {lengths}",
                partial(pieces.recompilations, kind=kind, lengths=lengths),
                60,
            )
            for kind, lengths in product(("gpt2", "modernbert"), ("as made", "padded", "dynamic"))
        ],
        whole("gpt2-124m"),
        whole("gpt2-124m", 120, **varlen),
        whole("modernbert-base"),
        whole("modernbert-base", 150, **varlen),
        whole("t5-base", 150),
        beside("gpt2-124m"),
        loop("ModernBERT", kind="modernbert", **both, lengths="dynamic"),
        loop("compiled head", kind="gpt2", head="compiled chunks"),
        loop("varlen padded", kind="gpt2", attn="varlen", lengths="padded"),
        loop("varlen padded, compiled head", kind="gpt2", **both, lengths="padded"),
        whole("smollm2-135m-sft"),
        whole("smollm2-135m-dpo"),
        Piece("attention", "relative positions", pieces.relative_positions, 60),
        loop("varlen, head in graph", kind="gpt2", attn="varlen", head="in graph", lengths="dynamic"),
        beside("modernbert-base"),
        Piece("resume", "resume", partial(resume, folder=folder, small=small), 120),
        Piece("optimizer", "optimizer", pieces.optimizer, 30),
        Piece("attention", "flex_attention", pieces.flexible_attention, 75),
        beside("t5-base", 90),
    ]


class Results:
    """`results.jsonl`, a line for each figure, written by the pieces; the tables made of it."""

    def __init__(self, folder: Path, about: dict):
        self.folder, self.about = folder, about
        self.lines = folder / "results.jsonl"

    def record(self, section: str, name: str, **figures) -> None:
        line = {"section": section, "name": name}
        line |= {key: value for key, value in figures.items() if value is not None}
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def entries(self) -> list[dict]:
        if not self.lines.exists():
            return []
        return [json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines()]

    def write(self) -> None:
        """`results.json` and `results.md`, as far as it got."""
        entries = self.entries()
        whole = json.dumps({"about": self.about, "results": entries}, indent=1)
        (self.folder / "results.json").write_text(whole + "\n", encoding="utf-8")
        text = [f"- {key}: {value}" for key, value in self.about.items()]
        for section in SECTIONS:
            own = [entry for entry in entries if entry["section"] == section]
            if own:
                text += ["", f"## {section}", "", *table(own)]
        (self.folder / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def shown(value) -> str:
    """A figure as the tables have it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(entries: list[dict]) -> list[str]:
    """Lines of Markdown: single figures as columns, whatever is a list or a mapping below."""
    hidden = ("section", "name", "error", "note")
    columns = dict.fromkeys(
        key
        for entry in entries
        for key, value in entry.items()
        if key not in hidden and not isinstance(value, list | dict)
    )
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"] if columns else []
    for entry in entries:
        if any(column in entry for column in columns):
            values = [
                f"{entry[column]:.1%}" if column == "mfu" and column in entry else shown(entry.get(column, ""))
                for column in columns
            ]
            lines.append(f"| {shown(entry['name'])} | {' | '.join(values)} |")
    for entry in entries:
        for key, value in entry.items():
            if key in ("error", "note"):
                lines += ["", f"**{entry['name']}: {key}**: {shown(value)}"]
            elif isinstance(value, dict) and value:
                lines += ["", f"{entry['name']}, {key}:", *(f"- `{part}`: {shown(of)}" for part, of in value.items())]
            elif isinstance(value, list) and value:
                lines += ["", f"{entry['name']}, {key}:", *(f"- {shown(part)[:700]}" for part in value[:20])]
    return lines


def run(piece: Piece, results: Results, shape, device: str, log: Path, limit: float, compile: bool) -> None:
    """A piece in a process of its own, forked from this one, which has imported everything and touched no GPU."""

    def work() -> None:
        os.setsid()
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 0
        try:
            import torch

            from benchmarks.gpu_pieces import Bench
            from unlabeled.planning import available_cores

            torch.set_num_threads(max(1, min(8, available_cores())))
            torch.set_float32_matmul_precision("high")
            bench = Bench(torch.device(device), shape, partial(results.record, piece.section), compile)
            bench.seconds = limit
            piece.call(bench)
        except BaseException as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).strip()}"[:400]
            results.record(piece.section, piece.name, error=reason)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(limit)
    if child.is_alive():
        results.record(piece.section, piece.name, error=f"not finished within {limit:.0f} s")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # it leads a group of its own, with the workers it has started
    child.join()


def about(options) -> dict:
    """Versions and the card, without starting CUDA here."""
    import subprocess

    import accelerate
    import torch
    import transformers

    from unlabeled.planning import available_cores

    found = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "commit": options.commit or commit()}
    found |= {"command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"accelerate": accelerate.__version__, "cores": available_cores()}
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found["card, driver, memory"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def commit() -> str:
    import subprocess

    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too")
    parser.add_argument(
        "--only", nargs="+", metavar="section", help=f"some of {', '.join(SECTIONS)}, or names of pieces"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="section", help="the same, to be left out")
    parser.add_argument("--work", type=Path, help="folder for text and runs (default: work in the output folder)")
    parser.add_argument("--commit", help="the project's commit, where there is no git")
    options = parser.parse_args()
    begun = time.monotonic()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "true"

    import torch

    from benchmarks.gpu_pieces import SMALL, Shape

    torch.set_num_threads(1)  # threads of this process would not survive the fork
    import unlabeled.config
    import unlabeled.training  # noqa: F401  # imported once for all pieces

    output = options.output.resolve()
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "results.jsonl").unlink(missing_ok=True)
    results = Results(output, about(options))
    work = (options.work or output / "work").resolve()
    chosen = [
        piece
        for piece in all_pieces(work, options.small)
        if (not options.only or {piece.section, piece.name} & set(options.only))
        and not {piece.section, piece.name} & set(options.skip)
    ]
    compiles = options.compile or options.device == "cuda"
    for index, piece in enumerate(chosen):
        missing = [module for module in piece.needs if not importlib.util.find_spec(module)]
        left = 60 * options.minutes - (time.monotonic() - begun)
        if missing or left < 8:
            reason = f"{missing[0]} is not installed" if missing else "no time was left"
            results.record(piece.section, piece.name, error=reason)
            continue
        since = time.monotonic()
        before = len(results.entries())
        log = output / "logs" / f"{index:02d}-{piece.name.replace(' ', '_').replace(',', '')}.log"
        shape = SMALL if options.small else Shape()
        run(piece, results, shape, options.device, log, min(piece.seconds, left), compiles)
        for entry in results.entries()[before:]:
            single = {key: value for key, value in entry.items() if not isinstance(value, dict | list)}
            print(", ".join(f"{key} {shown(value)[:200]}" for key, value in single.items()), flush=True)
        print(f"--- {piece.section}: {piece.name}: {time.monotonic() - since:.1f} s", flush=True)
        results.about["seconds"] = round(time.monotonic() - begun, 1)
        results.write()
    results.write()


if __name__ == "__main__":
    main()
