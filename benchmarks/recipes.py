"""Tokens per second, MFU, memory and loss of whole recipes with the shipped configurations, a few steps of each.

    python -m benchmarks.recipes                                    # for a GPU: 124 M to 250 M parameters, ten minutes
    python -m benchmarks.recipes clm-124m --attention sdpa varlen   # one of them, with each kind of attention
    python -m benchmarks.recipes clm-tiny --steps 40                # on a CPU

Nothing is fetched: they train on the plays, or on what `scripts/get_demo_data.py` has laid down. The first third of the
steps is left out, in which models are compiled and caches fill.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys

import yaml

from benchmarks.baselines import FOLDER, PLAYS, ROOT, SETTINGS, WIDE, Setting, make_tokenizer, tokenizer_of

T5 = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
T5 |= {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "vocab_size": WIDE}
ALL = SETTINGS | {
    "span-tiny": Setting("tiny/pretrain_span", 1),
    "span-250m": Setting("t5-base/pretrain_span", 1, PLAYS, T5, 16384),
    "sft-135m": Setting("smollm2-135m/sft_lora", 1, ("--eval_on_start=false",)),
}


def run(name: str, attention: str, steps: int, options: list[str]) -> str:
    """A line of the table."""
    setting, folder = ALL[name], FOLDER / "recipes" / f"{name}-{attention}"
    make_tokenizer(setting)
    shutil.rmtree(folder, ignore_errors=True)
    recipe = setting.config.split("/")[1].removesuffix("_lora")
    command = [sys.executable, f"recipes/{recipe}.py", "--config", f"recipes/configs/{setting.config}.yaml"]
    command += [*setting.changes, *options, f"--output_dir={folder}", f"--attn_implementation={attention}"]
    command += [f"--logging_steps={max(1, steps // 6)}", "--eval_strategy=no", "--save_strategy=no", "--report_to=none"]
    if setting.sizes:
        command.append(f"--config_overrides={json.dumps(setting.sizes)}")
    if setting.vocabulary:
        command.append(f"--tokenizer_name_or_path={tokenizer_of(setting)}")
    keys = yaml.safe_load((ROOT / f"recipes/configs/{setting.config}.yaml").read_text(encoding="utf-8"))
    keys |= dict(word.removeprefix("--").split("=", 1) for word in [*setting.changes, *options])
    command.append(f"--train_tokens={int(keys['batch_tokens']) * steps}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "w") as log:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode:
            return f"| {name} | {attention} | its log is {log.name} |"
    metrics = json.loads((folder / "metrics.json").read_text())
    history = [entry for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
    first, last = history[len(history) // 3 - 1], history[-1]
    speed = (last["tokens"] - first["tokens"]) / (last["train_seconds"] - first["train_seconds"])
    share = f"{metrics['mfu'] * speed / metrics['tokens_per_second']:.1%}" if "mfu" in metrics else ""
    figures = (
        f"{metrics['parameters'] / 1e6:,.1f}",
        f"{metrics['train_tokens'] // metrics['steps']:,}",
        f"{speed:,.0f}",
        f"{metrics['flops'] / metrics['train_tokens'] * speed / 1e9:,.0f} G",
        share,
        f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB",
        f"{history[0]['loss']:.2f} to {last['loss']:.2f}",
    )
    return f"| {name} | {attention} | {' | '.join(figures)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of {', '.join(ALL)}")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="kinds of attention (default: sdpa)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each (default: 60)")
    parser.add_argument("--option", action="append", default=[], help="of the recipe: --option=--compile=true")
    options = parser.parse_args()
    titles = ("", "attention", "M parameters", "tokens a step", "tokens/s", "FLOP/s", "MFU", "most memory", "loss")
    print(f"| {' | '.join(titles)} |\n|---|---|{'---:|' * (len(titles) - 2)}", flush=True)
    for name in options.settings or [name for name in ALL if not name.endswith(("tiny", "7m"))]:
        for attention in options.attention:
            if attention == "sdpa" or not name.startswith("span"):
                print(run(name, attention, options.steps, options.option), flush=True)


if __name__ == "__main__":
    main()
