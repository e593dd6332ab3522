"""Kill runs of two processes at random moments, resume them, and compare their weights with those of undisturbed runs.

    python -m experiments.crash_recovery.run                                 # all settings, 6 kills each, 4 with ZeRO
    python -m experiments.crash_recovery.run --settings masked-2 --kills 2   # some of them

experiments/crash_points interrupts runs of one process at every change to the file system.

The script makes its own text, tokenizers and small models. It prints a line of JSON for each setting and, at the end,
the table of docs/reliability.md. The exit status is 1 if the weights of any run differ from those of the undisturbed
run.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from experiments import runner
from experiments.runner import ROOT
from unlabeled.data.tokenizer_training import train_tokenizer
from unlabeled.runtime.checkpoints import STAGING

COMPILED_EXTENSIONS = ROOT / ".cache" / "torch_extensions"  # of DeepSpeed; compiling them takes a minute and a half
RECIPES = {"causal": "pretrain_clm", "masked": "pretrain_mlm", "sft": "sft"}
MODEL_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BATCH_TOKENS = 1024
RUN_TIMEOUT = 600  # seconds
EXIT_TIMEOUT = 120  # seconds that a process may live on after another one was killed
TOLERANCE = 1e-5  # of a weight; gloo may add up the gradients of two processes in another order
LAST_STEPS = 4  # no kill is planned in the last steps of a run, which would end before it


@dataclass(frozen=True)
class Setting:
    """A recipe on two processes."""

    objective: str
    zero_config: str | None = None  # a file in ds_configs, without its ending
    processes: int = 2

    @property
    def label(self) -> str:
        strategy = "ZeRO-2" if self.zero_config else "DDP"
        return f"{self.objective}, {self.processes} processes, {strategy}"


SETTINGS = {
    "causal-2": Setting("causal"),
    "masked-2": Setting("masked"),
    "sft-2": Setting("sft"),
    "causal-2-zero2": Setting("causal", "zero2"),
    "masked-2-zero2": Setting("masked", "zero2"),
    "sft-2-zero2": Setting("sft", "zero2"),
}


@dataclass
class Result:
    """What happened to the runs of a setting."""

    setting: str
    kills: int = 0
    saving: int = 0  # kills while a checkpoint was being written
    one_of_two: int = 0  # kills of one process only
    runs: int = 0
    difference: float = 0.0  # largest difference of a weight from the undisturbed run
    equal: bool = True  # bit for bit
    seconds: int = 0


def make_inputs(folder: Path) -> None:
    """Write texts, conversations and tokenizers."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) + "." for _ in range(600)]
    for split, split_texts in {"train": texts[:500], "validation": texts[500:]}.items():
        write_jsonl(folder / f"{split}.jsonl", [{"text": text} for text in split_texts])
        conversations = [
            [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:200] or "Yes."}]
            for text in split_texts
        ]
        write_jsonl(folder / f"conversations-{split}.jsonl", [{"messages": messages} for messages in conversations])
    train_tokenizer(texts, "bpe", 512).save_pretrained(folder / "tokenizer-causal")
    train_tokenizer(texts, "wordpiece", 512).save_pretrained(folder / "tokenizer-masked")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe_options(setting: Setting, folder: Path, steps: int) -> dict:
    """The options of a run that saves every other step, so that much of its time is spent saving."""
    options = {
        "train_data": folder / "train.jsonl",
        "eval_data": folder / "validation.jsonl",
        "prepared_dir": folder / "prepared",
        "max_length": 64,
        "train_tokens": steps * BATCH_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "per_device_train_batch_size": 8 // setting.processes,
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 10,
        "precision": "fp32",
        "compile": "false",
        "use_cpu": "true",
        "learning_rate": 0.001,
        "ddp_timeout": 60,
    }
    if setting.objective == "sft":
        options["model_name_or_path"] = folder / "causal-2" / "undisturbed"
        options["chat_template"] = ROOT / "recipes" / "templates" / "chatml.jinja"
        options["train_data"] = folder / "conversations-train.jsonl"
        options["eval_data"] = folder / "conversations-validation.jsonl"
    else:
        # BERT has dropout, so the random state has to be restored as well.
        options["model_type"] = "llama" if setting.objective == "causal" else "bert"
        options["config_overrides"] = json.dumps(MODEL_SIZES)
        options["tokenizer_name_or_path"] = folder / f"tokenizer-{setting.objective}"
    if setting.zero_config:
        options["deepspeed"] = ROOT / "ds_configs" / f"{setting.zero_config}.json"
    return options


def start(setting: Setting, options: dict, output_dir: Path) -> list[BaseProcess]:
    """Start the processes of a run. Each writes to a log of its own beside the output folder."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(setting.processes),
        "LOCAL_WORLD_SIZE": str(setting.processes),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(COMPILED_EXTENSIONS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # for ninja
    }
    return [
        runner.start_recipe(
            RECIPES[setting.objective],
            options | {"output_dir": output_dir},
            output_dir.with_name(f"{output_dir.name}-{rank}.log"),
            environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(setting.processes)
    ]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait(processes: list[BaseProcess], seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
    """Wait until all processes have ended, `until()` is true, or the time is up. Returns whether all have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        if not any(process.is_alive() for process in processes):
            return True
        time.sleep(0.002)
    return False


def wait_for_success(processes: list[BaseProcess], output_dir: Path) -> None:
    """Wait until a run has ended.

    Raises:
        SystemExit: it failed, or took too long.
    """
    has_ended = wait(processes, RUN_TIMEOUT)
    if not has_ended or any(process.exitcode != 0 for process in processes):
        raise SystemExit(f"{output_dir}: ended with {[process.exitcode for process in processes]}, see its logs")


def newest_step(output_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*")), default=0)


def is_saving(output_dir: Path) -> bool:
    return any((output_dir / STAGING).glob("checkpoint-*/*"))


def wait_for_random_moment(processes: list[BaseProcess], output_dir: Path, steps: int, rng: random.Random) -> bool:
    """Wait for a moment during start-up, after a step, or between the first file of a checkpoint and its renaming.

    Returns:
        Whether the run is still going on.
    """
    if rng.random() < 0.15:
        return not wait(processes, rng.uniform(0, 4))
    target = rng.randint(newest_step(output_dir), steps - LAST_STEPS)
    has_ended = wait(processes, RUN_TIMEOUT, lambda: newest_step(output_dir) > target)
    if rng.random() < 0.5:
        has_ended = has_ended or wait(processes, rng.uniform(0, 0.2))
    else:
        has_ended = has_ended or wait(processes, RUN_TIMEOUT, lambda: is_saving(output_dir))
        has_ended = has_ended or wait(processes, rng.uniform(0, 0.03))
    return not has_ended


def kill_and_compare(name: str, folder: Path, kills: int, steps: int, rng: random.Random) -> Result:
    """Run a setting undisturbed, then kill and resume runs of it until there were `kills`, and compare the weights."""
    started = time.monotonic()
    setting = SETTINGS[name]
    options = recipe_options(setting, folder, steps)
    undisturbed = folder / name / "undisturbed"
    wait_for_success(start(setting, options, undisturbed), undisturbed)
    expected = load_file(undisturbed / "model.safetensors")
    result = Result(name)
    while result.kills < kills:
        output_dir = folder / name / f"killed-{result.runs}"
        result.runs += 1
        kill_repeatedly(setting, options, output_dir, kills, steps, rng, result)
        compare_weights(output_dir, expected, result)
        shutil.rmtree(output_dir)
    result.seconds = round(time.monotonic() - started)
    return result


def kill_repeatedly(
    setting: Setting, options: dict, output_dir: Path, kills: int, steps: int, rng: random.Random, result: Result
) -> None:
    """Start a run, kill and restart it at random moments, and let the last attempt finish. Counts in `result`."""
    while True:
        processes = start(setting, options, output_dir)
        if result.kills >= kills or newest_step(output_dir) >= steps - LAST_STEPS:
            break
        if not wait_for_random_moment(processes, output_dir, steps, rng):
            break
        result.saving += is_saving(output_dir)
        kills_one = rng.random() < 0.5
        for process in rng.sample(processes, 1) if kills_one else processes:
            os.kill(process.pid, signal.SIGKILL)
        if not wait(processes, EXIT_TIMEOUT):
            raise SystemExit(
                f"{result.setting}: a process is still alive {EXIT_TIMEOUT} s after the other one was killed"
            )
        result.one_of_two += kills_one
        result.kills += 1
    wait_for_success(processes, output_dir)


def compare_weights(output_dir: Path, expected: dict[str, torch.Tensor], result: Result) -> None:
    """Add the largest difference of a weight to `result`."""
    weights = load_file(output_dir / "model.safetensors")
    if weights.keys() != expected.keys():
        raise SystemExit(f"{result.setting}: the saved parameters have other names, see {output_dir}")
    for key, tensor in weights.items():
        difference = float((tensor - expected[key]).abs().max())
        result.difference = max(result.difference, difference)
        result.equal &= torch.equal(tensor, expected[key])


def make_table(results: list[Result]) -> str:
    """The table of docs/reliability.md, in Markdown."""
    lines = [
        "| setting | kills | while saving | one process of two killed | largest weight difference |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        difference = "0 (bit-for-bit equal)" if result.equal else f"{result.difference:.1e}"
        cells = [SETTINGS[result.setting].label, result.kills, result.saving, result.one_of_two, difference]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kills = sum(result.kills for result in results)
    saving = sum(result.saving for result in results)
    one_of_two = sum(result.one_of_two for result in results)
    lines.append(f"| all | {kills} | {saving} | {one_of_two} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--kills", type=int, default=6, help="kills per setting, a third fewer with ZeRO (default: 6)")
    parser.add_argument("--steps", type=int, default=60, help="steps per run (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    default_folder = Path("outputs/crash_recovery")
    parser.add_argument("--folder", type=Path, default=default_folder, help=f"default: {default_folder}")
    args = parser.parse_args()
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    COMPILED_EXTENSIONS.mkdir(parents=True, exist_ok=True)
    runner.start_fork_server()
    make_inputs(folder)
    names = [name for name in SETTINGS if name in args.settings]
    if any(name.startswith("sft") for name in names) and "causal-2" not in names:
        names.insert(0, "causal-2")  # whose model SFT starts from
    results = []
    for name in names:
        kills = args.kills
        if SETTINGS[name].zero_config:  # DeepSpeed takes long to start
            kills = math.ceil(args.kills * 2 / 3)
        results.append(kill_and_compare(name, folder, kills, args.steps, random.Random(f"{args.seed} {name}")))
        print(json.dumps(asdict(results[-1])), flush=True)
    print(make_table(results))
    failed = [result.setting for result in results if not result.equal and result.difference > TOLERANCE]
    if failed:
        raise SystemExit(f"ended in other weights: {', '.join(failed)}")


if __name__ == "__main__":
    main()
