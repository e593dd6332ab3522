"""`lineage.json`: what a model comes from, so that every figure beside it can be traced and repeated."""

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import fields
from pathlib import Path

from unlabeled.corpus import file_sha256
from unlabeled.errors import UserError

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "deepspeed", "trl", "peft")


def versions() -> dict[str, str]:
    """Installed versions of what determines a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str | bool] | None:
    """Commit of the code that runs and whether files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def weights_sha256(folder: str) -> dict[str, str]:
    """sha256 of each weight file of a local folder."""
    return {path.name: file_sha256(str(path)) for path in sorted(Path(folder).glob("*.safetensors"))}


def resolved(*arguments) -> dict:
    """Every key of the dataclasses with its value that is not the default, for lineage and the card."""
    values = {}
    for instance in arguments:
        for member in fields(instance):
            value = getattr(instance, member.name)
            if not member.init or value == member.default or member.name.endswith("_token"):  # tokens are secrets
                continue
            if isinstance(value, str | int | float | bool | list | dict):
                values[member.name] = getattr(value, "value", value)
    return values


# What may change between the start of a run and its resumption: where things go and how often, and how a batch is
# divided; and what follows from other keys.
FREE = {
    "max_steps", "bf16", "torch_compile", "torch_compile_backend", "output_dir", "logging_steps",
    "logging_first_step", "eval_steps", "eval_strategy", "eval_on_start", "save_steps", "save_strategy",
    "save_total_limit", "report_to", "run_name", "project", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "deepspeed", "disable_tqdm", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "compile", "use_cpu", "max_loss_rise",
    "activation_checkpointing", "gradient_checkpointing",
}  # fmt: skip


def run_identity(manifest: dict, *arguments, **more) -> dict:
    """What makes two runs the same run: text, model, objective, budget, optimizer, seed."""
    return {k: v for k, v in resolved(*arguments).items() if k not in FREE} | {"text": manifest["fingerprint"], **more}


def parent_of(model_name_or_path: str | None) -> dict | None:
    """The model that a stage started from: its name, its weights and, where it has one, its own lineage."""
    if model_name_or_path is None:
        return None
    parent: dict = {"name_or_path": model_name_or_path}
    if os.path.isdir(model_name_or_path):
        parent["weights"] = weights_sha256(model_name_or_path)
        lineage = Path(model_name_or_path, "lineage.json")
        if lineage.exists():
            parent["lineage"] = json.loads(lineage.read_text(encoding="utf-8"))
    return parent


def make_lineage(configuration: dict, manifest: dict, plan: dict, metrics: dict, parent: dict | None) -> dict:
    """The record of one stage, with that of its parent inside."""
    return {
        "stage": f"pretrain_{configuration['objective']}",
        "parent": parent,
        "configuration": configuration,
        "data": {key: manifest[key] for key in ("train", "evaluation", "splits", "fingerprint", "tokenizer")},
        "plan": {key: value for key, value in plan.items() if key != "lines"},
        "metrics": metrics,
        "versions": versions(),
        "git": git_state(),
    }


def check_push(args) -> None:
    """Ask the Hub before training whether it knows the token that the model will be pushed with.

    Raises:
        UserError: `push_to_hub` is set, and there is no token, it is refused or may only read, or no Hub answers.
    """
    if not args.push_to_hub or args.process_index:
        return
    from huggingface_hub import constants, get_session, get_token
    from huggingface_hub.utils import build_hf_headers

    token = args.hub_token or get_token()
    if not token:
        raise UserError("push_to_hub needs a token; set HF_TOKEN, run `hf auth login`, or set push_to_hub to false")
    try:  # not HfApi().whoami, which waits for ever
        headers = build_hf_headers(token=token)
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=10)
        who = answer.json() if answer.status_code == 200 else {}
    except Exception as error:  # offline, no route, no certificate, no JSON
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the network, or set "
            "push_to_hub to false"
        ) from error
    if not who:
        raise UserError(
            f"push_to_hub: {constants.ENDPOINT} refuses the token (status {answer.status_code}); set HF_TOKEN to a "
            "valid one, or push_to_hub to false"
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("push_to_hub: the token may only read; set HF_TOKEN to one that may write")


CARD = """---
{front}
---

# {name}

{sentence}

![Loss against tokens]({picture})

## How it was trained

| | |
|---|---|
{facts}

## Figures

On {documents:,} held-out documents ({bytes:,} bytes), evaluated in exact sums over all tokens:

| | |
|---|---|
{figures}

## Text

{data}

## How to use it

```python
{usage}
```

{samples}
Everything that determined this model (configuration, hashes of the text, versions, commit) is in `lineage.json`.
"""

USAGE = {
    "clm": """from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate("{example}", max_new_tokens=50)[0]["generated_text"])""",
    "mlm": """from transformers import pipeline

fill = pipeline("fill-mask", model="{name}")
for guess in fill("{example}"):
    print(guess["token_str"], guess["score"])""",
}
OBJECTIVES = {
    "clm": ("text-generation", "next-token prediction"),
    "mlm": ("fill-mask", "masked-token prediction"),
}


def write_card(folder: str, lineage: dict, example: str) -> None:
    """Write `README.md`, the model card, from the lineage alone; nothing in it is left to fill in.

    Args:
        example: a prompt (causal) or a sentence with the mask token (masked) that the usage shows.
    """
    objective = lineage["configuration"]["objective"]
    task, description = OBJECTIVES[objective]
    plan, metrics, parent = lineage["plan"], lineage["metrics"], lineage["parent"]
    name = Path(folder).resolve().name
    base = parent["name_or_path"] if parent else None
    front = ["library_name: transformers", f"pipeline_tag: {task}", *([f"base_model: {base}"] if base else [])]
    front.append("tags:\n- unlabeled\n- pretraining")
    facts = {
        "Objective": description,
        "Start": f"continued from {base}" if base else "from scratch",
        "Parameters": f"{plan['parameters']:,} ({plan['embedding_parameters']:,} in embeddings)",
        "Tokens": f"{metrics['train_tokens']:,} in {metrics['steps']:,} steps",
        "Compute": f"{plan['flops']:.3g} FLOPs in {metrics['train_seconds']:,.0f} s",
        "Device": f"{plan['device']}, {plan['precision']}",
        "Versions": ", ".join(f"{package} {version}" for package, version in lineage["versions"].items()),
    }
    figures = {
        "Loss (nats per target token)": f"{metrics['eval_loss']:.4f}",
        "Perplexity": f"{metrics['perplexity']:.2f}",
        "Bits per byte": f"{metrics['bits_per_byte']:.4f}",
        "Unigram entropy of the targets (nats)": f"{metrics['unigram_entropy']:.4f}",
    }
    split = lineage["data"]["splits"]
    sources = [f"- `{source['path']}`" for source in lineage["data"]["train"]]
    text = CARD.format(
        front="\n".join(front),
        name=name,
        sentence=f"A {plan['parameters'] / 1e6:,.1f} M parameter model trained by {description}.",
        picture="loss.png",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        documents=split["validation"]["documents"],
        bytes=split["validation"]["bytes"],
        figures="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        data=f"{split['train']['text_tokens']:,} tokens in {split['train']['documents']:,} documents of\n\n"
        + "\n".join(sources),
        usage=USAGE[objective].format(name=name, example=json.dumps(example, ensure_ascii=False)[1:-1]),
        samples="Samples are in `samples.md`.\n",
    )
    Path(folder, "README.md").write_text(text, encoding="utf-8")
