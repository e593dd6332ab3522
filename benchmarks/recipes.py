"""Tokens per second, MFU, memory and loss of whole recipes with the shipped configurations, a few steps each.

    python -m benchmarks.recipes                                    # for a GPU: 124M to 250M parameters, ten minutes
    python -m benchmarks.recipes clm-124m --attention sdpa varlen   # one of them, with each attention implementation
    python -m benchmarks.recipes clm-tiny --steps 40                # on a CPU

Nothing is downloaded: the models train on the plays, or on the data of `scripts/get_demo_data.py`. The first third of
the steps, in which models are compiled and caches fill, is not timed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.settings import (
    FOLDER,
    GPT2_VOCABULARY_SIZE,
    ROOT,
    SETTINGS,
    SHAKESPEARE_OPTIONS,
    T5_BASE_SIZES,
    Setting,
    make_tokenizer,
    tokenizer_folder,
)
from benchmarks.tables import table_header

T5_SIZES = T5_BASE_SIZES | {"vocab_size": GPT2_VOCABULARY_SIZE}
ALL_SETTINGS = SETTINGS | {
    "span-tiny": Setting("tiny/pretrain_span", 1),
    "span-250m": Setting("t5-base/pretrain_span", 1, SHAKESPEARE_OPTIONS, T5_SIZES, 16384),
    "sft-135m": Setting("smollm2-135m/sft_lora", 1, ("--eval_on_start=false",)),
}
GPU_SETTINGS = [name for name in ALL_SETTINGS if not name.endswith(("tiny", "7m"))]
COLUMNS = (
    "",
    "attention",
    "parameters (M)",
    "tokens per step",
    "tokens/s",
    "FLOP/s",
    "MFU",
    "peak memory",
    "loss",
)


def make_command(setting: Setting, attention: str, steps: int, options: list[str], output_dir: Path) -> list[str]:
    """The command line of a recipe."""
    recipe = setting.config.split("/")[1].removesuffix("_lora")
    config = f"recipes/configs/{setting.config}.yaml"
    command = [sys.executable, f"recipes/{recipe}.py", "--config", config, *setting.options, *options]
    command += [f"--output_dir={output_dir}", f"--attn_implementation={attention}"]
    command += [f"--logging_steps={max(1, steps // 6)}", "--eval_strategy=no", "--save_strategy=no", "--report_to=none"]
    if setting.config_overrides:
        command.append(f"--config_overrides={json.dumps(setting.config_overrides)}")
    if setting.tokenizer_size:
        command.append(f"--tokenizer_name_or_path={tokenizer_folder(setting)}")
    values = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
    for option in [*setting.options, *options]:
        key, value = option.removeprefix("--").split("=", 1)
        values[key] = value
    command.append(f"--train_tokens={int(values['batch_tokens']) * steps}")
    return command


def run(name: str, attention: str, steps: int, options: list[str]) -> str:
    """Run a recipe. Returns its row of the table, or one that names the log if it failed."""
    setting = ALL_SETTINGS[name]
    output_dir = FOLDER / "recipes" / f"{name}-{attention}"
    make_tokenizer(setting)
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    command = make_command(setting, attention, steps, options, output_dir)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(output_dir.with_suffix(".log"), "w") as log:
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
    if status:
        return f"| {name} | {attention} | failed, see {log.name} |"
    cells = [name, attention, *read_results(output_dir)]
    return f"| {' | '.join(cells)} |"


def read_results(output_dir: Path) -> list[str]:
    """The cells of a run: its speed without the first third of the steps, its memory, and its first and last loss."""
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    history = json.loads((output_dir / "history.json").read_text(encoding="utf-8"))
    entries = [entry for entry in history if "loss" in entry]
    first = entries[len(entries) // 3 - 1]
    last = entries[-1]
    tokens_per_second = (last["tokens"] - first["tokens"]) / (last["train_seconds"] - first["train_seconds"])
    flops_per_token = metrics["flops"] / metrics["train_tokens"]
    mfu = ""
    if "mfu" in metrics:
        mfu = f"{metrics['mfu'] * tokens_per_second / metrics['tokens_per_second']:.1%}"
    return [
        f"{metrics['parameters'] / 1e6:,.1f}",
        f"{metrics['train_tokens'] // metrics['steps']:,}",
        f"{tokens_per_second:,.0f}",
        f"{flops_per_token * tokens_per_second / 1e9:,.0f} G",
        mfu,
        f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB",
        f"{entries[0]['loss']:.2f} to {last['loss']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of {', '.join(ALL_SETTINGS)}")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="attention implementations (default: sdpa)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each recipe (default: 60)")
    parser.add_argument("--option", action="append", default=[], help="of the recipe: --option=--compile=true")
    args = parser.parse_args()
    print(table_header(COLUMNS, text_columns=2), flush=True)
    for name in args.settings or GPU_SETTINGS:
        for attention in args.attention:
            if attention == "sdpa" or not name.startswith("span"):
                print(run(name, attention, args.steps, args.option), flush=True)


if __name__ == "__main__":
    main()
