"""Tokens per second of our trainer beside stock `Trainer` and a plain loop, and an ablation of its optimizations.

    python -m benchmarks.speed                       # tiny and 7M models, causal and masked: an hour on two cores
    python -m benchmarks.speed clm-7m --rounds 3     # one of them
    python -m benchmarks.speed clm-124m mlm-150m     # for a GPU: gpt2-124m and modernbert-base
    python -m benchmarks.plot_speed                  # draws the results in outputs/bench

Each variant is a process of its own with the same model, text and batch in tokens. On a CPU the variants take turns of
a few steps, so that other load on the machine affects all of them alike; ratios compare turns of the same round.

- stock: as in the documentation of transformers: `group_texts`, `DataCollatorForLanguageModeling`, `Trainer`, defaults.
- loop: a plain PyTorch loop over our rows, with all optimizations.
- packed: our trainer without optimizations; each row after it adds one optimization.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

from benchmarks.settings import FOLDER, ROOT, SETTINGS, Setting, make_tokenizer

REPORT_PREFIX = "report: "  # of the lines of a worker that are meant for the parent process
# `head`: `ChunkedLinearCrossEntropy` computes the output head at the targets only; without, all logits are computed.
UNOPTIMIZED = {
    "head": False,
    "precision": "fp32",
    "attn_implementation": "sdpa",
    "compile": "false",
    "optimizer": "adamw",
}
OPTIMIZATIONS = {
    "packed": {},
    "+ head at the targets": {"head": True},
    "+ bf16": {"precision": "auto"},
    "+ lengths for masks": {"attn_implementation": "varlen"},
    "+ compiled": {"compile": "true"},
    "+ Muon": {"optimizer": "muon"},
}


def make_variants(has_bf16: bool, has_gpu: bool) -> dict[str, dict]:
    """The options of each variant, by its name. Optimizations that the device does not support are left out."""
    unsupported = set()
    if not has_bf16:
        unsupported.add("+ bf16")
    if not has_gpu:
        unsupported.add("+ lengths for masks")
    options = UNOPTIMIZED
    variants = {"stock": options, "loop": options}
    for name, change in OPTIMIZATIONS.items():
        if name not in unsupported:
            options = options | change
            variants[name] = options
    variants["loop"] = options
    return variants


# --- The process of a variant -----------------------------------------------------------------------------------------


class TurnTimer:
    """Reports how long the steps of a turn took, then waits for the next turn.

    The first step is a turn of its own. It reports the time since the process was started.
    """

    def __init__(self, steps_per_turn: int):
        self.steps_per_turn = steps_per_turn
        self.steps = 0
        self.turn_start = time.perf_counter()

    def on_step_end(self) -> bool:
        """Count a step; returns True if training should stop."""
        import torch

        self.steps += 1
        if self.steps > 1 and self.steps % self.steps_per_turn:
            return False
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.steps == 1:
            send_report({"first_step": time.time() - float(os.environ["STARTED"])})
        else:
            send_report({"seconds": time.perf_counter() - self.turn_start})
        continues = sys.stdin.readline().strip() == "go"
        self.turn_start = time.perf_counter()
        return not continues


def send_report(report: dict) -> None:
    print(REPORT_PREFIX + json.dumps(report), flush=True)


def train_variant(setting: Setting, name: str, options: dict) -> None:
    """Train a variant until the parent process ends it, then report its memory and the FLOPs of a token."""
    from transformers import TrainerCallback

    from benchmarks.baselines import TrainingSetup, train_loop, train_ours, train_stock
    from unlabeled.planning import (
        count_parameters,
        device_name,
        peak_flops,
        peak_memory_bytes,
        training_flops_per_token,
    )

    setup = TrainingSetup(setting, options)
    timer = TurnTimer(setting.steps_per_turn)

    class StopCallback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = timer.on_step_end()

    if name == "loop":
        train_loop(setup, timer.on_step_end)
    elif name == "stock":
        train_stock(setup, StopCallback())
    else:
        train_ours(setup, StopCallback())
    args = setup.args
    counts = count_parameters(setup.model)
    head_share = setup.head_share if options.get("head") else 1.0
    report = {
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "flops_per_token": training_flops_per_token(setup.model.config, counts, args.max_length, head_share=head_share),
        "peak_flops": peak_flops(device_name(args.device), args.precision),
        "batch_tokens": args.batch_tokens,
        "parameters": counts.total,
        "device": device_name(args.device),
    }
    send_report(report)


# --- The parent process -----------------------------------------------------------------------------------------------


def measure(setting_name: str, rounds: int) -> tuple[dict[str, dict], list[dict[str, float]]]:
    """Train all variants of a setting.

    On a CPU they take turns. On a GPU, which cannot hold them all and which nobody else uses, they run one by one.

    Returns:
        The final report of each variant, and for each round the seconds per step of each variant.
    """
    import torch

    from unlabeled.config.precision import has_fast_bf16

    setting = SETTINGS[setting_name]
    has_gpu = torch.cuda.is_available()
    make_tokenizer(setting)
    variants = make_variants(has_fast_bf16(not has_gpu), has_gpu)
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER / "compiled", ignore_errors=True)  # so that compilation takes as long as the first time
    groups = [[name] for name in variants] if has_gpu else [list(variants)]
    reports: dict[str, dict] = {}
    turns: list[dict[str, float]] = [{} for _ in range(rounds + 1)]
    for names in groups:
        processes = {}
        for name in names:
            processes[name] = start_worker(setting_name, name, variants[name])
            reports[name] = read_report(processes[name])  # of the first step, which compiles
        for index, turn in enumerate(turns):
            order = names if index % 2 else names[::-1]
            for name in order:
                print("go", file=processes[name].stdin, flush=True)
                turn[name] = read_report(processes[name])["seconds"] / setting.steps_per_turn
            if index:
                print("  ".join(f"{name} {turn[name]:.3f}" for name in order), file=sys.stderr, flush=True)
        for name, process in processes.items():
            print("end", file=process.stdin, flush=True)
            reports[name] |= read_report(process)
            process.wait()
    return reports, turns[1:]  # the first turns fill caches, and are one step shorter


def start_worker(setting_name: str, name: str, options: dict) -> subprocess.Popen:
    """Start the process of a variant. It waits after its first step."""
    file_name = name.strip("+ ").replace(" ", "-")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "STARTED": str(time.time()),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "compiled" / file_name),
    }
    command = [sys.executable, "-m", "benchmarks.speed", setting_name, "--worker", name, json.dumps(options)]
    with open(FOLDER / f"{setting_name}-{file_name}.log", "w") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
        )


def read_report(process: subprocess.Popen) -> dict:
    """The next report of a worker. Other lines of its output, by `Trainer`, are skipped."""
    for line in process.stdout:
        if line.startswith(REPORT_PREFIX):
            return json.loads(line.removeprefix(REPORT_PREFIX))
    raise SystemExit(f"{' '.join(process.args[-3:])} ended; its log is in {FOLDER}")


def format_range(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def make_table(setting_name: str, reports: dict[str, dict], turns: list[dict[str, float]]) -> str:
    """A Markdown table: medians over the rounds, ratios with their range."""
    setting = SETTINGS[setting_name]
    first_report = next(iter(reports.values()))
    parameters = first_report["parameters"] / 1e6
    lines = [
        f"## {setting_name}: {parameters:.1f}M parameters, {first_report['batch_tokens']:,} tokens per step",
        "",
        f"{first_report['device']}; {len(turns)} rounds of {setting.steps_per_turn} steps.",
        "",
        "| | tokens/s | times stock | FLOP/s | peak memory | time to first step | in 10 minutes, times stock |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, report in reports.items():
        ratios = [turn["stock"] / turn[name] for turn in turns]
        tokens_per_second = report["batch_tokens"] / statistics.median(turn[name] for turn in turns)
        flops_per_second = tokens_per_second * report["flops_per_token"]
        flops_cell = f"{flops_per_second / 1e9:,.0f} G"
        if report["peak_flops"]:
            flops_cell += f" ({flops_per_second / report['peak_flops']:.1%})"
        training_time_ratio = (600 - report["first_step"]) / (600 - reports["stock"]["first_step"])
        cells = [
            name,
            f"{tokens_per_second:,.0f}",
            format_range(ratios),
            flops_cell,
            f"{report['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{report['first_step']:.0f} s",
            f"{statistics.median(ratios) * training_time_ratio:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    last_variant = list(reports)[-1]
    ratios = [turn["loop"] / turn[last_variant] for turn in turns]
    lines += [
        "",
        f"Our trainer with all optimizations runs at {statistics.median(ratios):.3f} of the loop's speed "
        f"({min(ratios):.2f} to {max(ratios):.2f}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, options = args.worker
        train_variant(SETTINGS[args.settings[0]], name, json.loads(options))
        return
    for setting_name in args.settings or list(SETTINGS)[:4]:
        reports, turns = measure(setting_name, args.rounds)
        results = json.dumps({"reports": reports, "turns": turns})
        (FOLDER / f"speed-{setting_name}.json").write_text(results, encoding="utf-8")
        print(make_table(setting_name, reports, turns), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
