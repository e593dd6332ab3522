"""Tokens per second beside what people would use instead, and of each lever by itself.

    python -m benchmarks.speed                       # tiny and 7 M models, causal and masked: an hour on two cores
    python -m benchmarks.speed clm-7m --rounds 3     # one of them
    python -m benchmarks.speed clm-124m mlm-150m     # for a GPU: gpt2-124m and modernbert-base
    python -m benchmarks.plot_speed                      # draws what they have left in outputs/bench

Each contestant is a process of its own with the same model, text and batch in tokens. They take turns of some steps, so
that what else the machine does meets all of them; the ratio of a round is that of turns next to each other.

- stock: as in transformers' documentation: `group_texts`, `DataCollatorForLanguageModeling`, `Trainer`, its defaults.
- loop: a plain PyTorch loop over our rows, with all levers of the last line.
- packed: our Trainer with every lever off; then one lever more in each line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

from benchmarks.baselines import FOLDER, ROOT, SETTINGS, Ingredients, Setting, loop, make_tokenizer, ours, stock

SAYS = "contestant: "
# Adding one at a time. `head`: the output head at the targets, by `ChunkedLinearCrossEntropy`; without, all logits.
OFF = {"head": False, "precision": "fp32", "attn_implementation": "sdpa", "compile": "false", "optimizer": "adamw"}
LEVERS = {
    "packed": {},
    "+ head at the targets": {"head": True},
    "+ bf16": {"precision": "auto"},
    "+ lengths for masks": {"attn_implementation": "varlen"},
    "+ compiled": {"compile": "true"},
    "+ Muon": {"optimizer": "muon"},
}


def contestants(bf16: bool, gpu: bool) -> dict[str, dict]:
    """By name, the levers of each: without those that the device is not made for."""
    found, levers = {"stock": OFF, "loop": {}}, OFF
    left_out = {name for name, there in (("+ bf16", bf16), ("+ lengths for masks", gpu)) if not there}
    for name, more in LEVERS.items():
        if name not in left_out:
            found[name] = levers = levers | more
    return found | {"loop": levers}


class Turns:
    """Says how long some steps took, then waits for the next turn."""

    def __init__(self, steps: int):
        self.steps, self.done, self.before = steps, 0, time.perf_counter()

    def step_is_over(self, loss=None) -> bool:
        """True when there are to be no more."""
        import torch

        self.done += 1
        if self.done > 1 and self.done % self.steps:
            return False
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        said = {"seconds": time.perf_counter() - self.before}
        if self.done == 1:
            said = {"first_step": time.time() - float(os.environ["STARTED"])}
        print(SAYS + json.dumps(said), flush=True)
        go_on = sys.stdin.readline().strip() == "go"
        self.before = time.perf_counter()
        return not go_on


def work(setting: Setting, name: str, levers: dict) -> None:
    """Train until told to stop, then say what it took."""
    from transformers import TrainerCallback

    from unlabeled.planning import (
        count_parameters,
        device_name,
        peak_flops,
        peak_memory_bytes,
        training_flops_per_token,
    )

    one, turns = Ingredients(setting, levers), Turns(setting.turn)
    args = one.args

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = turns.step_is_over()

    if name == "loop":
        loop(one, turns.step_is_over)
    else:
        (stock if name == "stock" else ours)(one, Callback())
    counts = count_parameters(one.model)
    head_share = one.share if levers.get("head") else 1.0
    said = {
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "flops_per_token": training_flops_per_token(one.model.config, counts, args.max_length, head_share=head_share),
        "peak_flops": peak_flops(device_name(args.device), args.precision),
        "batch_tokens": args.batch_tokens,
        "parameters": counts.total,
        "device": device_name(args.device),
    }
    print(SAYS + json.dumps(said), flush=True)


# --- The contest ---------------------------------------------------------------------------------------------------


def contest(name: str, rounds: int) -> tuple[dict[str, dict], list[dict[str, float]]]:
    """What each contestant said at its end, and of each round the seconds of a step of each.

    On a GPU, which nobody else uses and which does not hold them all, they come one after the other.
    """
    import torch

    from unlabeled.models.optimizers import fast_bf16

    setting, gpu = SETTINGS[name], torch.cuda.is_available()
    make_tokenizer(setting)
    field = contestants(fast_bf16(not gpu), gpu)
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER / "compiled", ignore_errors=True)  # so that compiling takes what it takes the first time
    said, turns = {}, [{} for _ in range(rounds + 1)]
    for together in [[one] for one in field] if gpu else [list(field)]:
        running = {}
        for one in together:
            running[one] = start(name, one, field[one])
            said[one] = answer(running[one])  # of the first step, which compiles
        for number, turn in enumerate(turns):
            for one in together if number % 2 else together[::-1]:
                print("go", file=running[one].stdin, flush=True)
                turn[one] = answer(running[one])["seconds"] / setting.turn
            if number:
                print("  ".join(f"{one} {turn[one]:.3f}" for one in together), file=sys.stderr, flush=True)
        for one, process in running.items():
            print("end", file=process.stdin, flush=True)
            said[one] |= answer(process)
            process.wait()
    return said, turns[1:]  # the first turns fill caches, and are one step shorter


def start(name: str, one: str, levers: dict) -> subprocess.Popen:
    """A contestant in a process of its own, which waits after its first step."""
    plain = one.strip("+ ").replace(" ", "-")
    mine = {"STARTED": str(time.time()), "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "compiled" / plain)}
    with open(FOLDER / f"{name}-{plain}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed", name, "--worker", one, json.dumps(levers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | mine,
        )  # fmt: skip


def answer(process) -> dict:
    """What a contestant says next; Trainer prints other things."""
    for line in process.stdout:
        if line.startswith(SAYS):
            return json.loads(line.removeprefix(SAYS))
    raise SystemExit(f"{' '.join(process.args[-3:])} ended; its log is in {FOLDER}")


def table(name: str, said: dict[str, dict], turns: list[dict[str, float]]) -> str:
    """Markdown: medians over the rounds, ratios with their range."""
    setting, some = SETTINGS[name], next(iter(said.values()))
    lines = [
        f"## {name}: {some['parameters'] / 1e6:.1f} M parameters, {some['batch_tokens']:,} tokens a step",
        "",
        f"{some['device']}; {len(turns)} rounds of {setting.turn} steps.",
        "",
        "| | tokens/s | times stock | FLOP/s | peak memory | to the first step | of 10 minutes, times stock |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    median = {one: statistics.median(turn[one] for turn in turns) for one in said}
    for one, last in said.items():
        ratios = sorted(turn["stock"] / turn[one] for turn in turns)
        speed = last["batch_tokens"] / median[one]
        flops = speed * last["flops_per_token"]
        share = f" ({flops / last['peak_flops']:.1%})" if last["peak_flops"] else ""
        ten = statistics.median(ratios) * (600 - last["first_step"]) / (600 - said["stock"]["first_step"])
        lines.append(
            f"| {one} | {speed:,.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {flops / 1e9:,.0f} G{share} | {last['peak_memory_bytes'] / 1e9:.2f} GB | {last['first_step']:.0f} s "
            f"| {ten:.2f} |"
        )
    trainer = sorted(turn["loop"] / turn[list(said)[-1]] for turn in turns)
    lines += ["", f"Trainer with all levers runs at {statistics.median(trainer):.3f} of the loop's speed "
                  f"({trainer[0]:.2f} to {trainer[-1]:.2f})."]  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default: 5)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, levers = options.worker
        return work(SETTINGS[options.settings[0]], name, json.loads(levers))
    for name in options.settings or list(SETTINGS)[:4]:
        said, turns = contest(name, options.rounds)
        (FOLDER / f"speed-{name}.json").write_text(json.dumps({"said": said, "turns": turns}))
        print(table(name, said, turns), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
