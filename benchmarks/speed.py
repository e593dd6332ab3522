"""Tokens per second beside what people would use instead, and of each lever by itself.

    python benchmarks/speed.py                       # tiny and 7 M models, causal and masked: an hour on two cores
    python benchmarks/speed.py clm-7m --rounds 3     # one of them
    python benchmarks/speed.py clm-124m mlm-150m     # for a GPU: gpt2-124m and modernbert-base
    python benchmarks/figure.py                      # draws what they have left in outputs/bench

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
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"
SAYS = "contestant: "
SEVEN = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}


@dataclass(frozen=True)
class Setting:
    """What is trained: a configuration of `recipes/configs`, some of its keys replaced."""

    config: str
    turn: int  # steps
    changes: tuple[str, ...] = ()
    sizes: dict | None = None  # in the place of its `config_overrides`
    vocabulary: int | None = None  # of a tokenizer made for it

    @property
    def objective(self) -> str:
        return self.config.split("_")[-1]


ROWS = ("--max_length=256", "--batch_tokens=4096", "--per_device_train_batch_size=16", "--train_tokens=4096000")
SETTINGS = {
    "clm-tiny": Setting("tiny/pretrain_clm", 40),
    "mlm-tiny": Setting("tiny/pretrain_mlm", 40),
    "clm-7m": Setting("tiny/pretrain_clm", 4, ROWS, SEVEN | {"tie_word_embeddings": True}, 8192),
    "mlm-7m": Setting("tiny/pretrain_mlm", 4, ROWS, SEVEN | {"local_attention": 128}, 8192),
    "clm-124m": Setting("gpt2-124m/pretrain_clm", 20, ("--batch_tokens=16384", "--train_tokens=163840000")),
    "mlm-150m": Setting("modernbert-base/pretrain_mlm", 20, ("--batch_tokens=32768", "--train_tokens=327680000")),
}
# Adding one at a time. `head`: the output head at the targets, by `LossAtTargets`; without, all logits.
OFF = {"head": False, "precision": "fp32", "compile": "false", "optimizer": "adamw"}
LEVERS = {
    "packed": {},
    "+ head at the targets": {"head": True},
    "+ bf16": {"precision": "auto"},
    "+ compiled": {"compile": "true"},
    "+ Muon": {"optimizer": "muon"},
}


def contestants(bf16: bool) -> dict[str, dict]:
    """By name, the levers of each: `bf16` is left out where the device is not fast with it."""
    found, levers = {"stock": {}, "loop": {}}, OFF
    for name, more in LEVERS.items():
        if bf16 or name != "+ bf16":
            found[name] = levers = levers | more
    return found | {"loop": levers}


# --- A contestant --------------------------------------------------------------------------------------------------


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
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, TrainerCallback, set_seed

    from unlabeled.arguments import DataArguments, ModelArguments, PretrainingArguments
    from unlabeled.budget import count_parameters, peak_flops, peak_memory_bytes, training_flops_per_token
    from unlabeled.collators import MaskedCollator, MaskingArguments, PackedCollator
    from unlabeled.console import device_name
    from unlabeled.corpus import parse_sources, read_documents
    from unlabeled.losses import LossAtTargets, token_nats
    from unlabeled.modeling import from_scratch, scratch_config, sliding_window
    from unlabeled.packing import TrainingRows
    from unlabeled.parsing import parse
    from unlabeled.prepare import load_prepared, prepare
    from unlabeled.tokenization import load_tokenizer

    masked = setting.objective == "mlm"
    options = ["--config", str(ROOT / f"recipes/configs/{setting.config}.yaml"), *setting.changes]
    options += ["--save_strategy=no", "--eval_strategy=no", f"--output_dir={FOLDER / 'run'}", "--disable_tqdm=true"]
    options += [f"--{key}={value}" for key, value in levers.items() if key != "head"]
    groups = (ModelArguments, DataArguments, *([MaskingArguments] if masked else []), PretrainingArguments)
    model_args, data_args, *masking, args = parse(*groups, args=options)
    tokenizer = load_tokenizer(str(tokenizer_of(setting) or model_args.tokenizer_name_or_path))
    set_seed(0)
    config = scratch_config(
        model_args.model_type, setting.sizes or model_args.config_overrides, tokenizer, args.max_length
    )
    model = from_scratch(AutoModelForMaskedLM if masked else AutoModelForCausalLM, config, "sdpa").to(args.device)
    model.config.use_cache = False
    sources = parse_sources(data_args.train_data, "train_data", data_args.text_column)
    turns, share = Turns(setting.turn), masking[0].mlm_probability if masked else 1.0

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = turns.step_is_over()

    if name == "stock":
        stock(model, tokenizer, args, [text for one in sources for text in read_documents(one)], share, Callback())
    else:
        held_out = parse_sources(data_args.eval_data, "eval_data", data_args.text_column)
        folder = prepare(sources, held_out, tokenizer, setting.objective, args.max_length, data_args.prepared_dir)
        rows, manifest = load_prepared(folder)
        training = TrainingRows(rows["train"], args.max_steps * args.rows_per_step, seed=0)
        if masked:
            window = sliding_window(model.config)
            collator = MaskedCollator(
                tokenizer, mlm=True, mlm_probability=share, max_length=args.max_length, sliding_window=window
            )
        else:
            collator = PackedCollator(tokenizer, mlm=False, max_length=args.max_length)
        if levers["head"]:
            loss = LossAtTargets(model, shift=not masked)
        else:

            def loss(outputs, labels, num_items_in_batch):
                return token_nats(outputs.logits, labels, shift=not masked) / num_items_in_batch

        if name == "loop":
            loop(model, args, training, collator, loss, turns)
        else:
            ours(model, tokenizer, args, training, collator, loss, setting.objective, manifest, rows, Callback())
    counts = count_parameters(model)
    head_share = share if levers.get("head") else 1.0
    peak = peak_flops(device_name(args.device), args.precision)
    print(
        SAYS
        + json.dumps(
            {
                "peak_memory_bytes": peak_memory_bytes(args.device),
                "flops_per_token": training_flops_per_token(config, counts, args.max_length, head_share=head_share),
                "peak_flops": peak,
                "batch_tokens": args.batch_tokens,
                "parameters": counts.total,
                "device": device_name(args.device),
            }
        ),
        flush=True,
    )


def stock(model, tokenizer, args, texts: list[str], share: float, callback) -> None:
    """What one finds in the documentation: texts one after the other, cut into blocks, and Trainer's defaults."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    def tokenize(batch):
        return tokenizer(batch["text"])

    def group_texts(examples):
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // args.max_length * args.max_length
        return {
            key: [values[i : i + args.max_length] for i in range(0, total, args.max_length)]
            for key, values in joined.items()
        }

    blocks = Dataset.from_dict({"text": texts}).map(tokenize, batched=True, remove_columns=["text"])
    blocks = blocks.map(group_texts, batched=True)
    masked = {"mlm": True, "mlm_probability": share} if share < 1 else {"mlm": False}
    defaults = TrainingArguments(
        output_dir=args.output_dir, per_device_train_batch_size=args.rows_per_step, max_steps=args.max_steps,
        save_strategy="no", disable_tqdm=True, use_cpu=args.use_cpu,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, **masked)
    Trainer(model=model, args=defaults, train_dataset=blocks, data_collator=collator, callbacks=[callback]).train()


def loop(model, args, training, collator, loss, turns: Turns) -> None:
    """The same rows, loss and optimizer without Trainer, accelerate, callbacks, logging and schedule."""
    import torch
    from torch.utils.data import DataLoader

    from unlabeled.optim import BuildOptimizer

    optimizer = BuildOptimizer()(model.train(), **args.optimizer_kwargs)
    run = torch.compile(model) if args.compile == "true" else model
    for batch in DataLoader(training, batch_size=args.rows_per_step, collate_fn=collator):
        batch = moved(batch, args.device)
        labels = batch.pop("labels")
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            outputs = run(**batch)
        loss(outputs, labels, (labels != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        if turns.step_is_over():
            return


def moved(value, device):
    return {key: moved(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value.to(device)


def ours(model, tokenizer, args, training, collator, loss, objective: str, manifest, rows, callback) -> None:
    """As in the recipes."""
    from transformers import PrinterCallback

    from unlabeled.optim import BuildOptimizer
    from unlabeled.training import ExactTrainer

    args.torch_compile = args.compile == "true"
    args.torch_compile_backend = "inductor" if args.torch_compile else None
    trainer = ExactTrainer(
        model=model, args=args, train_dataset=training, eval_dataset=rows["validation"], data_collator=collator,
        processing_class=tokenizer, compute_loss_func=loss, objective=objective, splits=manifest["splits"],
        optimizer_cls_and_kwargs=(BuildOptimizer, args.optimizer_kwargs), callbacks=[callback],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


# --- The contest ---------------------------------------------------------------------------------------------------


def tokenizer_of(setting: Setting) -> Path | None:
    """The folder of the tokenizer that is made for a setting, None where its configuration names one."""
    kind = "wordpiece" if setting.objective == "mlm" else "bpe"
    return FOLDER / f"tokenizer-{kind}-{setting.vocabulary}" if setting.vocabulary else None


def contest(name: str, rounds: int) -> tuple[dict[str, dict], list[dict[str, float]]]:
    """What each contestant said at its end, and of each round the seconds of a step of each."""
    from unlabeled.optim import fast_bf16

    setting = SETTINGS[name]
    import torch

    folder = tokenizer_of(setting)
    if folder and not folder.exists():
        make = [
            sys.executable,
            str(ROOT / "scripts/train_tokenizer.py"),
            "--data",
            "data/demo/shakespeare/train.parquet",
        ]
        make += ["--algorithm", folder.name.split("-")[1], "--vocab_size", str(setting.vocabulary)]
        subprocess.run([*make, "--output_dir", str(folder)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    field = contestants(fast_bf16(not torch.accelerator.is_available()))
    running, said = {}, {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER / "compiled", ignore_errors=True)  # so that compiling takes what it takes the first time
    for one in field:
        command = [sys.executable, __file__, name, "--worker", one, json.dumps(field[one])]
        with open(FOLDER / f"{name}-{one.strip('+ ').replace(' ', '-')}.log", "w") as log:
            running[one] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
                env=os.environ | {"STARTED": str(time.time()), "HF_HUB_OFFLINE": "1",
                                  "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "compiled" / one.strip("+ "))},
            )  # fmt: skip
        said[one] = answer(running[one])  # of the first step, which compiles
    turns = []
    for number in range(rounds + 1):
        order = list(running) if number % 2 else list(running)[::-1]
        seconds = {}
        for one in order:
            print("go", file=running[one].stdin, flush=True)
            seconds[one] = answer(running[one])["seconds"]
        if number == 0:  # caches, and steps that are one fewer
            continue
        turns.append({one: seconds[one] / setting.turn for one in running})
        print("  ".join(f"{one} {turns[-1][one]:.3f}" for one in running), file=sys.stderr, flush=True)
    for one, process in running.items():
        print("end", file=process.stdin, flush=True)
        said[one] |= answer(process)
        process.wait()
    return said, turns


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
