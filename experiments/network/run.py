"""Run every recipe and script on local data without a network, and record what they try to connect to.

    sudo python -m experiments.network.run                  # all commands
    sudo python -m experiments.network.run --only sft dpo   # some of them

The script makes its own text, tokenizers and small models. Each command runs as a process of its own, in a network
namespace whose only interface drops every packet, so that everything that waits for an answer runs into its timeout. It
runs with HF_HUB_OFFLINE unset and with HF_HUB_OFFLINE=1, both at the same time. The table has the median seconds of
both; and for the first, the connection attempts of Python code and the packets sent by any code. The exit status is 1
if there are any, except those of EXPECTED_CONNECTIONS. Needs root.
"""

import argparse
import gzip
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

ROOT = Path(__file__).resolve().parents[2]
RECORDER = Path(__file__).resolve().parent / "recorder"
TEMPLATE = ROOT / "recipes" / "templates" / "chatml.jinja"
MODEL_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}

EXPECTED_CONNECTIONS = {
    "clm, two processes": "torch.distributed resolves the names of its peers' addresses",
    "doctor": "it checks whether the Hub answers",
}

# A pair of virtual interfaces: packets sent to one arrive at the other, which neither forwards nor answers them. IPv6
# is off because its neighbour discovery sends packets of its own.
BLACK_HOLE = """
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
ip link set lo up
ip link add v0 type veth peer name v1
ip link set v0 up
ip link set v1 up
ip addr add 10.77.0.2/24 dev v0
ip neigh add 10.77.0.1 lladdr 02:00:00:00:00:01 dev v0
ip route add default via 10.77.0.1 dev v0
echo nameserver 10.77.0.1 > {resolver}
mount --bind {resolver} /etc/resolv.conf
set +e
"$@"
status=$?
awk '$1 == "v0:" {{print $11}}' /proc/net/dev > {packets}
exit $status
"""


def in_black_hole(command: list[str], folder: Path) -> list[str]:
    """The command in a network namespace of its own, which writes the number of packets it sent to `folder/packets`."""
    files = {name: shlex.quote(str(folder / name)) for name in ("resolver", "packets")}
    return ["unshare", "--net", "--mount", "sh", "-ec", BLACK_HOLE.format(**files), "sh", *command]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path) -> None:
    """Write texts, conversations, preferences, classes, tags and pairs, each for training and validation."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(200)]
    for split, count in (("train", 300), ("validation", 60)):
        texts = [" ".join(rng.choices(words, k=rng.randint(20, 40))) for _ in range(count)]
        questions = [{"role": "user", "content": text[:20]} for text in texts]
        answers = [{"role": "assistant", "content": text[20:80] or "yes"} for text in texts]
        write_lines(folder / f"text-{split}.jsonl", [{"text": text} for text in texts])
        conversations = [{"messages": list(messages)} for messages in zip(questions, answers, strict=True)]
        write_lines(folder / f"conversations-{split}.jsonl", conversations)
        rejected = {"role": "assistant", "content": "no no no"}
        preferences = [
            {"prompt": [question], "chosen": [answer], "rejected": [rejected]}
            for question, answer in zip(questions, answers, strict=True)
        ]
        write_lines(folder / f"preferences-{split}.jsonl", preferences)
        write_lines(folder / f"classes-{split}.jsonl", [{"text": text, "label": text[0]} for text in texts])
        tags = [{"tokens": text.split(), "tags": [word[0] for word in text.split()]} for text in texts]
        write_lines(folder / f"tags-{split}.jsonl", tags)
        write_lines(folder / f"pairs-{split}.jsonl", [{"anchor": text[:30], "positive": text[30:]} for text in texts])
    formats = folder / "formats"  # a file for each reader
    formats.mkdir()
    table = pa.table({"text": texts})
    parquet.write_table(table, formats / "part.parquet")
    csv.write_csv(table, formats / "part.csv")
    (formats / "part.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    with gzip.open(formats / "part.jsonl.gz", "wt") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    for number in range(20):
        (formats / f"part-{number}.txt").write_text(texts[number], encoding="utf-8")
    config = {"model_name_or_path": "clm"} | recipe_options("pretrain_clm", "text")
    (folder / "pretrain_clm.yaml").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chain.yaml").write_text(json.dumps(make_chain(folder)), encoding="utf-8")


def make_chain(folder: Path) -> dict:
    """A chain of tokenizer, pretraining and SFT. Its paths are absolute because a chain runs in the repository."""
    pretraining = {"model_type": "llama", "config_overrides": MODEL_SIZES, "prepared_dir": str(folder / "prepared")}
    fine_tuning = {"chat_template": str(TEMPLATE), "prepared_dir": str(folder / "prepared")}
    text = str(folder / "text-train.jsonl")
    stages = [
        {"tokenizer": {"algorithm": "bpe", "vocab_size": 384, "data": text}},
        {"pretrain_clm": recipe_options("pretrain_clm", str(folder / "text")) | pretraining},
        {"sft": recipe_options("sft", str(folder / "conversations")) | fine_tuning},
    ]
    return {"output_dir": str(folder / "chain"), "prompts": ["what now"], "stages": stages}


def recipe_command(recipe: str, data: str, output_dir: str, **options) -> list[str]:
    """The command of a short run; `options` replace the defaults."""
    options = recipe_options(recipe, data, output_dir=output_dir, **options)
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *arguments]


def recipe_options(recipe: str, data: str, **options) -> dict:
    """The options of a short run; `options` replace the defaults."""
    if recipe in ("dpo", "embed"):
        budget = {"train_pairs": 32, "batch_pairs": 8}
    elif recipe in ("classify", "tag"):
        budget = {"train_examples": 32, "batch_examples": 8}
    else:
        budget = {"train_tokens": 2048, "batch_tokens": 512}
    defaults = budget | {
        "train_data": f"{data}-train.jsonl",
        "eval_data": f"{data}-validation.jsonl",
        "max_length": 64,
        "per_device_train_batch_size": 8,
        "precision": "fp32",
        "logging_steps": 1,
        "use_cpu": True,
    }
    if recipe.startswith("pretrain") or recipe in ("sft", "dpo"):
        defaults["prepared_dir"] = "prepared"
    return defaults | options


def distributed(command: list[str]) -> list[str]:
    """The command on two processes of this machine, with DDP."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "ds_configs" / "ddp.yaml")]
    return [command[0], *launcher, "--num_processes", "2", *command[1:]]


def script_command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]


def from_scratch(model_type: str, tokenizer: str, sizes: dict) -> dict[str, str]:
    return {"model_type": model_type, "config_overrides": json.dumps(sizes), "tokenizer_name_or_path": tokenizer}


def commands() -> dict[str, list[str]]:
    """{name: command}; each reads what those before it have written, relative to one working directory."""
    tokenizers = {
        f"tokenizer-{algorithm}": script_command(
            "train_tokenizer",
            "--algorithm",
            algorithm,
            "--vocab_size",
            "384",
            "--data",
            "text-train.jsonl",
            "--eval_data",
            "text-validation.jsonl",
            "--output_dir",
            f"tokenizer-{algorithm}",
        )
        for algorithm in ("bpe", "wordpiece", "unigram")
    }
    clm = from_scratch("llama", "tokenizer-bpe", MODEL_SIZES)
    chat = {"chat_template": TEMPLATE}
    prepare = script_command("prepare_data", "--objective", "clm", "--model_type", "llama", "--tokenizer_name_or_path")
    prepare += ["tokenizer-bpe", "--train_data", "formats", "--eval_fraction", "0.1", "--prepared_dir", "prepared-2"]
    prepare += ["--output_dir", "none", "--max_length", "64", "--train_tokens", "512", "--batch_tokens", "512"]
    tags = {"text_column": "tokens", "label_column": "tags"}
    return tokenizers | {
        "prepare": prepare,
        "clm": recipe_command("pretrain_clm", "text", "clm", **clm),
        "mlm": recipe_command(
            "pretrain_mlm", "text", "mlm", **from_scratch("bert", "tokenizer-wordpiece", MODEL_SIZES)
        ),
        "span": recipe_command("pretrain_span", "text", "span", **from_scratch("t5", "tokenizer-unigram", T5_SIZES)),
        "clm continued": recipe_command("pretrain_clm", "text", "clm-2", model_name_or_path="clm"),
        "clm, two processes": distributed(
            recipe_command("pretrain_clm", "text", "clm-4", model_name_or_path="clm", batch_tokens=1024)
        ),
        "clm, tensorboard": recipe_command(
            "pretrain_clm", "text", "clm-5", model_name_or_path="clm", report_to="tensorboard"
        ),
        "clm, trackio": recipe_command("pretrain_clm", "text", "clm-6", model_name_or_path="clm", report_to="trackio"),
        "clm streamed": recipe_command("pretrain_clm", "text", "clm-3", model_name_or_path="clm", stream="true"),
        "sft": recipe_command("sft", "conversations", "sft", model_name_or_path="clm", **chat),
        "sft lora, own base": recipe_command(
            "sft", "conversations", "sft-own", model_name_or_path="clm", adapter="lora", **chat
        ),
        "sft lora": recipe_command("sft", "conversations", "sft-lora", model_name_or_path="sft", adapter="lora"),
        "dpo": recipe_command("dpo", "preferences", "dpo", model_name_or_path="sft"),
        "dpo lora": recipe_command("dpo", "preferences", "dpo-lora", model_name_or_path="sft-lora", adapter="lora"),
        "classify": recipe_command("classify", "classes", "classify", model_name_or_path="mlm"),
        "tag": recipe_command("tag", "tags", "tag", model_name_or_path="mlm", **tags),
        "embed": recipe_command("embed", "pairs", "embed", model_name_or_path="mlm"),
        "merge": script_command("merge_adapter", "sft-lora", "--output_dir", "merged"),
        "generate": script_command("generate", "sft", "what now"),
        "generate with an adapter": script_command("generate", "dpo-lora", "what now"),
        "evaluate": script_command(
            "evaluate_model", "clm", "--data", "text-validation.jsonl", "--output_dir", "evaluated"
        ),
        "plan": script_command("plan", "--config", "pretrain_clm.yaml", "--device", "H100"),
        "push --dry-run": script_command("push_to_hub", "clm", "--repo-id", "name/repo", "--dry-run"),
        "doctor": script_command("doctor"),
        "chain": script_command("run_chain", "chain.yaml"),
        "report": script_command("make_report", "chain"),
    }


def run(command: list[str], folder: Path, offline: bool) -> tuple[float, int]:
    """Run a command without a network. Returns its seconds and its exit status."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"NETWORK_LOG": str(folder / "network.log"), "HF_HOME": str(folder / "home")}
    environment["PYTHONPATH"] = os.pathsep.join([str(RECORDER), str(ROOT)])
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    started = time.perf_counter()
    command = in_black_hole(command, folder)
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if process.returncode:
        print(process.stdout[-2000:], process.stderr[-2000:], sep="\n")
    return seconds, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of commands; their inputs have to be in --folder")
    parser.add_argument("--folder", type=Path, help="working directory, which is kept (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each command and setting (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="network-") as temporary:
        parent = (args.folder or Path(temporary)).absolute()
        folders = {False: parent / "online", True: parent / "offline"}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "text-train.jsonl").exists():
                make_data(folder)
        unexpected = 0
        print("| command | seconds | with HF_HUB_OFFLINE=1 | connection attempts | packets sent |")
        print("|---|---|---|---|---|")
        for name, command in commands().items():
            if not args.only or name in args.only:
                unexpected += measure(name, command, folders, args.repeats)
    raise SystemExit(unexpected > 0)


def measure(name: str, command: list[str], folders: dict[bool, Path], repeats: int) -> int:
    """Print the row of a command and its connection attempts. Returns the number of unexpected attempts and packets."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    attempts = []
    packets = 0
    for _ in range(repeats):
        for folder in folders.values():
            for path in (*outputs_of(command, folder), folder / "network.log"):
                subprocess.run(["rm", "-rf", str(path)], check=True)
        # Both at the same time, so that other load on the machine slows both.
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(lambda offline: run(command, folders[offline], offline), folders)
            for offline, (run_seconds, status) in zip(folders, results, strict=True):
                seconds[offline].append(run_seconds)
                if status:
                    raise SystemExit(f"{name} ends with status {status}")
        log = folders[False] / "network.log"
        attempts += [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
        packets += int((folders[False] / "packets").read_text())
    online_seconds = statistics.median(seconds[False])
    offline_seconds = statistics.median(seconds[True])
    print(f"| {name} | {online_seconds:.1f} | {offline_seconds:.1f} | {len(attempts)} | {packets} |", flush=True)
    for attempt in attempts:
        print(f"  {attempt['event']} {attempt['host']}: {' < '.join(reversed(attempt['stack']))[:1500]}")
    return 0 if name in EXPECTED_CONNECTIONS else len(attempts) + packets


def outputs_of(command: list[str], folder: Path) -> list[Path]:
    """The output folder of a command. It is deleted before the command runs again, which would find it finished."""
    if "chain.yaml" in command:
        return [folder / "chain"]
    outputs = [folder / value for key, value in pairwise(command) if key == "--output_dir"]
    outputs += [folder / word.removeprefix("--output_dir=") for word in command if word.startswith("--output_dir=")]
    return outputs


if __name__ == "__main__":
    main()
