"""Kill runs of two processes at random moments, some of them while they save, and see whether they end the same.

    python experiments/kills/run.py                                 # all settings, 6 kills each, 4 with ZeRO
    python experiments/kills/run.py --settings masked-2 --kills 2   # some of them

Runs of one process are interrupted at each change to the file system, see experiments/crash_points.

Makes its own text, tokenizers and small models. Prints a line for each setting and, at the end, the table of
docs/reliability.md; exits with 1 where a run has ended in other weights than the one that was left alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import forks
import torch
from safetensors.torch import load_file

from unlabeled.data.tokenization import train_tokenizer
from unlabeled.runtime.checkpoints import STAGING

ROOT = forks.ROOT
BUILT = ROOT / ".cache" / "torch_extensions"
RECIPES = {"causal": "pretrain_clm", "masked": "pretrain_mlm", "sft": "sft"}
SETTINGS = {  # name: recipe, processes, DeepSpeed's file
    "causal-2": ("causal", 2, None),
    "masked-2": ("masked", 2, None),
    "sft-2": ("sft", 2, None),
    "causal-2-zero2": ("causal", 2, "zero2"),
    "masked-2-zero2": ("masked", 2, "zero2"),
    "sft-2-zero2": ("sft", 2, "zero2"),
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PATIENCE = 120  # seconds that a process may live on after another one was killed


def make_ingredients(folder: Path) -> None:
    """Text, conversations and tokenizers."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) + "." for _ in range(600)]
    for split, part in {"train": texts[:500], "validation": texts[500:]}.items():
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        talks = [
            [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:200] or "Yes."}]
            for text in part
        ]
        lines = [json.dumps({"messages": talk}) + "\n" for talk in talks]
        (folder / f"talks-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(texts, "bpe", 512).save_pretrained(folder / "tokenizer-causal")
    train_tokenizer(texts, "wordpiece", 512).save_pretrained(folder / "tokenizer-masked")


def options_of(recipe: str, folder: Path, processes: int, deepspeed: str | None, steps: int) -> dict:
    """A run that saves at every other step, so that a good part of its time is saving."""
    options = {
        "train_data": folder / "train.jsonl", "eval_data": folder / "validation.jsonl",
        "prepared_dir": folder / "prepared", "max_length": 64, "train_tokens": steps * 1024, "batch_tokens": 1024,
        "per_device_train_batch_size": 8 // processes, "save_steps": 2, "save_total_limit": 2, "logging_steps": 10,
        "precision": "fp32", "compile": "false", "use_cpu": "true", "learning_rate": 0.001, "ddp_timeout": 60,
    }  # fmt: skip
    if recipe == "sft":
        template = ROOT / "recipes" / "templates" / "chatml.jinja"
        options |= {"model_name_or_path": folder / "causal-2" / "whole", "chat_template": template}
        options |= {f"{split}_data": folder / f"talks-{name}.jsonl" for split, name in
                    (("train", "train"), ("eval", "validation"))}  # fmt: skip
    else:
        options |= {
            "model_type": "llama" if recipe == "causal" else "bert"
        }  # BERT has dropout, its states come back too
        options |= {"config_overrides": json.dumps(SIZES)}
        options |= {"tokenizer_name_or_path": folder / f"tokenizer-{recipe}"}
    if deepspeed:
        options["deepspeed"] = ROOT / "ds_configs" / f"{deepspeed}.json"
    return options


def start(recipe: str, options: dict, output_dir: Path, processes: int) -> list:
    """The processes of one attempt; they append to a log each."""
    environment = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        environment |= {"LOCAL_WORLD_SIZE": str(processes), "DS_ACCELERATOR": "cpu"}
        environment["TORCH_EXTENSIONS_DIR"] = str(BUILT)  # what DeepSpeed compiles, a minute and a half
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    log = output_dir.parent / "log"
    return [
        forks.start_recipe(
            RECIPES[recipe],
            options | {"output_dir": output_dir},
            log.with_name(f"{output_dir.name}-{rank}.log"),
            environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
        )
        for rank in range(processes)
    ]


def wait(running: list, seconds: float, until=lambda: False) -> bool:
    """Whether all processes ended within so many seconds, or before something came true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        if not any(process.is_alive() for process in running):
            return True
        time.sleep(0.002)
    return False


def newest_step(output_dir: Path) -> int:
    return max((int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*")), default=0)


def being_saved(output_dir: Path) -> bool:
    return any((output_dir / STAGING).glob("checkpoint-*/*"))


def at_a_random_moment(running: list, output_dir: Path, steps: int, rng: random.Random) -> bool:
    """Wait for it: while the run starts, after some step, or between the first file of a save and its renaming."""
    if rng.random() < 0.15:
        return not wait(running, rng.uniform(0, 4))
    target = rng.randint(newest_step(output_dir), steps - 4)
    ended = wait(running, 600, lambda: newest_step(output_dir) > target)
    if rng.random() < 0.5:
        ended = ended or wait(running, rng.uniform(0, 0.2))
    else:
        ended = ended or wait(running, 600, lambda: being_saved(output_dir)) or wait(running, rng.uniform(0, 0.03))
    return not ended


def survive(name: str, folder: Path, kills: int, steps: int, rng: random.Random) -> dict:
    """Run one setting left alone, then kill by kill, and compare the weights."""
    recipe, processes, deepspeed = SETTINGS[name]
    options = options_of(recipe, folder, processes, deepspeed, steps)
    home, started = folder / name, time.monotonic()
    finish(start(recipe, options, home / "whole", processes), home / "whole")
    expected = load_file(home / "whole" / "model.safetensors")
    result = {"setting": name, "kills": 0, "saving": 0, "one_of_two": 0, "runs": 0, "difference": 0.0, "equal": True}
    while result["kills"] < kills:
        output_dir = home / f"killed-{result['runs']}"
        result["runs"] += 1
        while True:
            running = start(recipe, options, output_dir, processes)
            more = result["kills"] < kills and newest_step(output_dir) < steps - 4
            if not more or not at_a_random_moment(running, output_dir, steps, rng):
                break
            result["saving"] += being_saved(output_dir)
            one = processes > 1 and rng.random() < 0.5
            for process in rng.sample(running, 1) if one else running:
                os.kill(process.pid, signal.SIGKILL)
            if not wait(running, PATIENCE):
                raise SystemExit(f"{name}: a process lives on {PATIENCE} s after the other one was killed")
            result["one_of_two"] += one
            result["kills"] += 1
        finish(running, output_dir)
        found = load_file(output_dir / "model.safetensors")
        if found.keys() != expected.keys():
            raise SystemExit(f"{name}: other weights were saved, see {output_dir}")
        differences = [float((found[key] - expected[key]).abs().max()) for key in found]
        result["difference"] = max(result["difference"], *differences)
        result["equal"] &= all(torch.equal(found[key], expected[key]) for key in found)
        shutil.rmtree(output_dir)
    return result | {"seconds": round(time.monotonic() - started)}


def finish(running: list, output_dir: Path) -> None:
    if not wait(running, 600) or any(process.exitcode != 0 for process in running):
        raise SystemExit(f"{output_dir}: ended with {[process.exitcode for process in running]}, see its logs")


def table(results: list[dict]) -> str:
    """Markdown for docs/reliability.md."""
    lines = ["| setting | kills | of them while saving | one process of two | largest difference of a weight |"]
    lines += ["|---|---|---|---|---|"]
    for one in results:
        recipe, processes, deepspeed = SETTINGS[one["setting"]]
        kind = f"{processes} processes, {'ZeRO-2' if deepspeed else 'DDP'}"
        difference = "0, bit for bit" if one["equal"] else f"{one['difference']:.1e}"
        lone = one["one_of_two"]
        lines.append(f"| {recipe}, {kind} | {one['kills']} | {one['saving']} | {lone} | {difference} |")
    total = [sum(one[key] for one in results) for key in ("kills", "saving", "one_of_two")]
    return "\n".join([*lines, f"| all | {total[0]} | {total[1]} | {total[2]} | |"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--kills", type=int, default=6, help="of each setting, a third less with ZeRO (default: 6)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/kills"), help="default: outputs/kills")
    args = parser.parse_args()
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    forks.prepare()
    BUILT.mkdir(parents=True, exist_ok=True)
    make_ingredients(folder)
    wanted = [name for name in SETTINGS if name in args.settings]
    if any(name.startswith("sft") for name in wanted) and "causal-2" not in wanted:
        wanted.insert(0, "causal-2")  # the model to tune
    results = []
    for name in wanted:
        kills = args.kills if "zero" not in name else -(-args.kills * 2 // 3)  # DeepSpeed takes long to start
        results.append(survive(name, folder, kills, args.steps, random.Random(f"{args.seed} {name}")))
        print(json.dumps(results[-1]), flush=True)
    print(table(results))
    failed = [
        one["setting"] for one in results
        if not (one["equal"] or (SETTINGS[one["setting"]][1] > 1 and one["difference"] <= 1e-5))
    ]  # fmt: skip
    if failed:
        raise SystemExit(f"ended in other weights: {', '.join(failed)}")


if __name__ == "__main__":
    main()
