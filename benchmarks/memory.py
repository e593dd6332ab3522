"""Predicted against measured peak memory of a training step, by process, on this CPU. Prints a Markdown table.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.memory
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.memory --recipes

Each configuration trains three steps with `ExactTrainer` in fresh processes, on random rows of two documents.
Measured is the highest resident memory within the steps (VmHWM of /proc/self/status, reset as the first step begins)
less what is resident just before the model is built: the interpreter, torch, transformers, DeepSpeed and their open
connections. The C library returns every block of 64 KiB or more to the system as soon as it is freed
(MALLOC_MMAP_THRESHOLD_), so that what is resident is in use. Of two processes the larger one counts. What they send is
what the second step adds to the loopback device's counter. Linux only; results/memory_cpu.md has the table.

With --recipes whole runs of recipes: the peak of the process as `metrics.json` has it, evaluation and samples included,
beside what the run expected. Nothing is set but the threads. results/memory_recipes_cpu.md has that table.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.tables import table_header

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
LLAMA = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8192,
}  # fmt: skip
MODERNBERT = {
    "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8,
    "vocab_size": 16384,
}  # fmt: skip
BERT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8,
    "vocab_size": 8192,
}  # fmt: skip
GPT2 = {
    "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 8192, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}  # fmt: skip
SMALL = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
# So small because a CPU without matrix units for bf16 emulates it.
NARROW = LLAMA | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "vocab_size": 1024}
# name: model_type, sizes, rows of 256 tokens in a micro-batch, and what differs from one process and AdamW
RUNS = {
    "a Llama of 0.1 M": ("llama", SMALL, 1, {}),
    "a Llama of 0.1 M, ZeRO-2": ("llama", SMALL, 1, {"processes": 2, "zero": 2}),
    "Llama": ("llama", LLAMA, 4, {}),
    "Llama, 1 row": ("llama", LLAMA, 1, {}),
    "Llama, 4 accumulated": ("llama", LLAMA, 4, {"accumulation": 4}),
    "Llama, Muon, 1 row": ("llama", LLAMA, 1, {"optimizer": "muon"}),
    "Llama, eager attention": ("llama", LLAMA, 4, {"attention": "eager"}),
    "Llama, activation checkpointing, 16 rows": ("llama", LLAMA, 16, {"checkpointing": True}),
    "Llama, LoRA of rank 16, 8 rows": ("llama", LLAMA, 8, {"lora": 16}),
    "Llama of 8 x 128, bf16 by autocast, 12 rows": ("llama", NARROW, 12, {"precision": "bf16"}),
    "GPT-2": ("gpt2", GPT2, 6, {}),
    "BERT with dropout": ("bert", BERT, 4, {}),
    "ModernBERT": ("modernbert", MODERNBERT, 6, {}),
    "Llama, DDP": ("llama", LLAMA, 4, {"processes": 2}),
    "Llama, ZeRO-1": ("llama", LLAMA, 4, {"processes": 2, "zero": 1}),
    "Llama, ZeRO-2": ("llama", LLAMA, 4, {"processes": 2, "zero": 2}),
    "Llama, ZeRO-3": ("llama", LLAMA, 4, {"processes": 2, "zero": 3}),
    "Llama, ZeRO-2, 1 row": ("llama", LLAMA, 1, {"processes": 2, "zero": 2}),
    "Llama, ZeRO-2, 1 row, 2 accumulated": ("llama", LLAMA, 1, {"processes": 2, "zero": 2, "accumulation": 2}),
    "Llama, ZeRO-3, 1 row": ("llama", LLAMA, 1, {"processes": 2, "zero": 3}),
}
# Whole runs: recipe, YAML, steps, and what differs from the YAML.
MEDIUM = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}  # fmt: skip
LARGE = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}  # fmt: skip
CLM = ("pretrain_clm", "tiny/pretrain_clm")
RECIPES = {
    "tiny/pretrain_clm": (*CLM, 30, {}),
    "tiny/pretrain_mlm": ("pretrain_mlm", "tiny/pretrain_mlm", 30, {}),
    "tiny/pretrain_span": ("pretrain_span", "tiny/pretrain_span", 30, {}),
    "tiny/pretrain_clm, AdamW": (*CLM, 30, {"optimizer": "adamw", "learning_rate": 0.001}),
    "Llama of 7 M, 16 rows of 256": (
        *CLM, 6, {"config_overrides": json.dumps(MEDIUM), "max_length": 256, "batch_tokens": 4096,
                   "optimizer": "adamw", "learning_rate": 0.001},
    ),
    "Llama of 35 M, 8 rows of 256": (
        *CLM, 3, {"config_overrides": json.dumps(LARGE), "max_length": 256, "batch_tokens": 2048,
                  "optimizer": "adamw", "learning_rate": 0.001, "per_device_train_batch_size": 8,
                  "per_device_eval_batch_size": 8, "eval_data": "null", "eval_fraction": 0.01},
    ),
    "Llama of 35 M, 16 rows of 256, activation checkpointing": (
        *CLM, 3, {"config_overrides": json.dumps(LARGE), "max_length": 256, "batch_tokens": 4096,
                  "optimizer": "adamw", "learning_rate": 0.001, "activation_checkpointing": "true",
                  "per_device_eval_batch_size": 8, "eval_data": "null", "eval_fraction": 0.01},
    ),
}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "step", "reused")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def loopback() -> int:
    """Bytes that this machine has sent to itself."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[9]) for line in lines if line.lstrip().startswith("lo:"))


def worker(name: str, folder: str) -> None:
    """Train one configuration and write what it took."""
    import numpy as np
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PrinterCallback, TrainerCallback

    from unlabeled.config import PretrainingArguments
    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
    from unlabeled.data.tokenizer_training import train_tokenizer
    from unlabeled.models.adapters import apply_lora_config
    from unlabeled.models.attention import sliding_window
    from unlabeled.models.configs import scratch_config
    from unlabeled.models.loading import init_model
    from unlabeled.models.losses import ChunkedLinearCrossEntropy
    from unlabeled.models.optimizers import OptimizerFactory
    from unlabeled.planning import count_parameters
    from unlabeled.planning.memory import communication_bytes, memory_estimate
    from unlabeled.training import ExactTrainer

    model_type, sizes, rows, options = RUNS[name]
    length, processes, masked = 256, options.get("processes", 1), "bert" in model_type
    accumulation, stage = options.get("accumulation", 1), options.get("zero", 0)
    precision = options.get("precision", "fp32")
    batch_tokens = rows * length * accumulation * processes
    args = PretrainingArguments(
        output_dir=folder,
        train_tokens=STEPS * batch_tokens,
        batch_tokens=batch_tokens,
        max_length=length,
        per_device_train_batch_size=rows,
        precision=precision,
        compile="false",
        use_cpu=True,
        save_strategy="no",
        optimizer=options.get("optimizer", "adamw"),
        logging_steps=STEPS,
        disable_tqdm=True,
        activation_checkpointing=options.get("checkpointing", False),
        deepspeed=str(ROOT / "ds_configs" / f"zero{stage}.json") if stage else None,
    )
    tokenizer = train_tokenizer([str(n) for n in range(2000)], "wordpiece" if masked else "bpe", 100 if masked else 300)
    random = np.random.default_rng(args.process_index)
    dataset = [
        {
            "input_ids": random.integers(5, len(tokenizer), length),
            "lengths": [length // 2] * 2,
            "word_starts": np.ones(length, bool),
            "row": row,
            "epoch": 0,
        }
        for row in range(STEPS * args.rows_per_step)
    ]
    config = scratch_config(model_type, sizes, tokenizer, length)
    window = sliding_window(config) if masked else None
    options_of_collator = {"mlm": True, "sliding_window": window} if masked else {}
    collator = DataCollatorForPackedLanguageModeling(tokenizer, max_length=length, **options_of_collator)

    square = torch.ones(256, 256)  # what a first step loads once and for all is not the model's
    (square.requires_grad_() @ square).sum().backward()
    before = resident("VmRSS")
    attention = options.get("attention", "sdpa")
    model = init_model(AutoModelForMaskedLM if masked else AutoModelForCausalLM, config, attention)
    model.config.use_cache = False
    if "lora" in options:
        model = apply_lora_config(
            model, LoraConfig(task_type="CAUSAL_LM", r=options["lora"], target_modules="all-linear")
        )
    loss = ChunkedLinearCrossEntropy(model, shift=not masked, target_share=0.15 if masked else 1.0)
    counts = count_parameters(model)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    parts = memory_estimate(
        counts,
        config,
        max_length=length,
        per_device_train_batch_size=rows,
        precision=precision,
        zero_stage=stage,
        optimizer=args.optimizer,
        world_size=processes,
        attn_implementation=attention,
        trainable=trainable,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=args.activation_checkpointing,
        head_share=loss.head_share,
        device="cpu",
    )
    del square

    sent = []  # bytes through the loopback device, by all processes, before each step

    class Peak(TrainerCallback):
        def on_step_begin(self, args, state, *_, **__):
            sent.append(loopback())
            if state.global_step == 0:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts from VmRSS again

        def on_step_end(self, *_, **__):
            self.bytes = resident("VmHWM") - before

    trainer = ExactTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        compute_loss_func=loss,
        objective="mlm" if masked else "clm",
        optimizer_cls_and_kwargs=(OptimizerFactory, args.optimizer_kwargs),
        splits={"train": {"rows": len(dataset)}},
        callbacks=[peak := Peak()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = {
        "parameters": counts.total, "parts": parts, "measured": peak.bytes,
        "predicted": sum(parts.values()),
        "sending": communication_bytes(counts, stage, processes, precision, trainable, accumulation),
        "sent": (sent[-1] - sent[-2]) // processes,
    }  # fmt: skip
    Path(folder, f"{args.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


def measure(name: str) -> dict:
    """What the larger of the processes took; each run has its own."""
    *_, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        built = ROOT / ".cache" / "torch_extensions"  # DeepSpeed compiles its collectives for the CPU once
        built.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TORCH_EXTENSIONS_DIR": str(built),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where ninja is
        }  # fmt: skip
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
        command = [
            sys.executable,
            *(launch if "processes" in options else []),
            str(Path(__file__).resolve()),
            "--worker",
            name,
            folder,
        ]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")]
        if done.returncode or not found:
            raise SystemExit(f"{name}: {done.stderr[-4000:]}")
    return max(found, key=lambda process: process["measured"])


def row(name: str, found: dict) -> str:
    """A line of the table; sizes in MB of 1e6 bytes."""
    cells = [name, f"{found['parameters'] / 1e6:.1f} M", *(f"{found['parts'][part] / 1e6:,.0f}" for part in PARTS)]
    cells += [f"{found[key] / 1e6:,.0f}" for key in ("predicted", "measured")]
    cells.append(f"{found['predicted'] / found['measured']:.2f}")
    cells += [f"{found[key] / 1e6:,.0f}" if "processes" in RUNS[name][-1] else "" for key in ("sending", "sent")]
    return f"| {' | '.join(cells)} |"


def measure_recipe(name: str, precision: str) -> dict:
    """`metrics.json` of a short run of a recipe, in a process of its own."""
    recipe, config, steps, options = RECIPES[name]
    yaml_file = ROOT / "recipes" / "configs" / f"{config}.yaml"
    batch_tokens = options.get("batch_tokens", 2048)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "train_tokens": steps * batch_tokens, "precision": precision, "compile": "false", "use_cpu": "true",
            "eval_strategy": "no", "save_strategy": "no", "output_dir": folder, **options,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, f"recipes/{recipe}.py", "--config", str(yaml_file), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        metrics = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
        lineage = json.loads(Path(folder, "lineage.json").read_text(encoding="utf-8"))
    return metrics | {"before": lineage["plan"]["memory_before"]}


def recipe_row(name: str, precision: str, metrics: dict) -> str:
    """A line of the table of --recipes; sizes in MB of 1e6 bytes."""
    expected, peak = metrics["expected_memory_bytes"], metrics["peak_memory_bytes"]
    sizes = [metrics["before"], expected - metrics["before"], expected, peak]
    cells = [name, precision, f"{metrics['parameters'] / 1e6:.1f} M", *(f"{size / 1e6:,.0f}" for size in sizes)]
    return f"| {' | '.join([*cells, f'{expected / peak:.2f}'])} |"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="*", metavar="run", help=f"all, or some of: {'; '.join((*RUNS, *RECIPES))}")
    arguments.add_argument("--recipes", action="store_true", help="whole runs of recipes, in bf16 and in fp32")
    arguments.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        return worker(*options.worker)
    if options.recipes:
        titles = ["run", "precision", "parameters", "before the model", "model", "predicted", "measured", "ratio"]
        print(table_header(titles, text_columns=2), flush=True)
        for name in options.runs or RECIPES:
            for precision in ("bf16", "fp32"):
                print(recipe_row(name, precision, measure_recipe(name, precision)), flush=True)
        return None
    if not Path("/proc/self/status").exists():
        raise SystemExit("the peak within steps is read from /proc, so this needs Linux; --recipes does not")
    titles = ["run", "parameters", *PARTS, "predicted", "measured", "ratio", "to send", "sent"]
    print(table_header(titles, text_columns=1), flush=True)
    for name in options.runs or RUNS:
        print(row(name, measure(name)), flush=True)


if __name__ == "__main__":
    main()
