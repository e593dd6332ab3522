"""`lineage.json`: what a model comes from, so that every figure can be traced; and the model card that it tells.

Both are pushed, so neither holds a path of the machine or the name of a user; see `portable`.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import yaml

from unlabeled.errors import UserError
from unlabeled.planning import describe_cost
from unlabeled.runtime.files import file_sha256, read_json_object

PACKAGES = "torch transformers accelerate datasets tokenizers deepspeed trl peft sentence-transformers".split()  # noqa: SIM905


def versions() -> dict[str, str]:
    """Installed versions of what determines a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
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
    files = sorted(Path(folder).glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:  # hashing leaves the other threads alone
        return dict(zip((file.name for file in files), pool.map(file_sha256, files), strict=True))


REPOSITORY = Path(__file__).resolve().parents[2]


def portable(value):
    """A value, or a structure of them, with its paths relative to the repository or the working directory.

    Of a path outside of both only the last part is left. Names of the Hub and relative paths stay as they are.
    """
    if isinstance(value, dict):
        return {portable(key): portable(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [portable(member) for member in value]
    if not isinstance(value, str | Path):
        return value
    path = Path(value)
    leaves = path.is_absolute() or ".." in path.parts or path.parts[:1] == ("~",)
    return _relative(path) if leaves else value


def _relative(path: Path) -> str:
    absolute, home = Path(os.path.abspath(path.expanduser())), Path.home()
    for base in (REPOSITORY, Path.cwd()):
        names_user = home != base and home.is_relative_to(base)  # as from / or /home
        if absolute.is_relative_to(base) and not names_user:
            return str(absolute.relative_to(base))
    return absolute.name


def non_default_arguments(*arguments) -> dict:
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
KEYS_FREE_TO_CHANGE_ON_RESUME = {
    "max_steps", "bf16", "torch_compile", "torch_compile_backend", "output_dir", "logging_steps",
    "logging_first_step", "eval_steps", "eval_strategy", "eval_on_start", "save_steps", "save_strategy",
    "save_total_limit", "report_to", "run_name", "project", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "deepspeed", "disable_tqdm", "push_to_hub",
    "logging_strategy", "log_on_each_node",
    "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "hub_always_push", "hub_revision", "compile",
    "train_data", "eval_data", "test_data", "prepared_dir",  # the manifest's fingerprint is of their content
    "use_cpu", "loss_spike_threshold", "max_hours", "ddp_timeout", "activation_checkpointing", "gradient_checkpointing",
}  # fmt: skip


# The parts of a lineage, and what they hold.
LINEAGE = {"stage": str, "configuration": dict, "data": dict, "plan": dict, "metrics": dict}


def read_lineage(path: Path) -> dict:
    """The record that a stage has left in its folder, with those of its parents inside.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    remedy = "restore it, or remove it to go on from a model of unknown origin"
    lineage = read_json_object(path, remedy)
    part = lineage
    while part is not None:
        for key, kind in LINEAGE.items():
            if not isinstance(part.get(key), kind):
                raise UserError(f"{path} is no lineage, as {key} in it is {str(part.get(key))[:60]!r}; {remedy}")
        parent = part.get("parent")
        if not isinstance(parent, dict | None):
            raise UserError(f"{path} is no lineage, as parent in it is {str(parent)[:60]!r}; {remedy}")
        part = parent.get("lineage") if parent else None
        if not isinstance(part, dict | None):
            raise UserError(f"{path} is no lineage, as that of its parent is {str(part)[:60]!r}; {remedy}")
    return lineage


def parent_of(model_name_or_path: str | None) -> dict | None:
    """The model that a stage started from: its name, its weights and, where it has one, its own lineage."""
    if model_name_or_path is None:
        return None
    parent: dict = {"name_or_path": model_name_or_path}
    if os.path.isdir(model_name_or_path):
        parent["weights"] = weights_sha256(model_name_or_path)
        lineage = Path(model_name_or_path, "lineage.json")
        if lineage.exists():
            parent["lineage"] = read_lineage(lineage)
    return parent


def licensed(source: dict) -> dict:
    """A source with the licence that a README.md beside its files states in a line of its own, if one does."""
    path = Path(source["path"])
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if "files" not in source or not readme.is_file():
        return source
    stated = re.search(r"^Licence: (.+)$", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return source | {"licence": stated[1].strip()} if stated else source


def make_lineage(configuration: dict, manifest: dict, plan: dict, metrics: dict, parent: dict | None) -> dict:
    """The record of one stage, with that of its parent inside, without paths of this machine; see `portable`."""
    return {
        "stage": PRETRAINING.get(configuration["objective"], configuration["objective"]),
        "parent": portable(parent),
        "configuration": portable(configuration),
        "data": {key: manifest[key] for key in ("splits", "fingerprint", "tokenizer")}
        | {key: [portable(licensed(source)) for source in manifest[key]] for key in ("train", "evaluation")},
        "plan": {key: portable(value) for key, value in plan.items() if key != "lines"},
        "metrics": metrics,
        "versions": versions(),
        "git": git_state(),
    }


CARD = """---
{front}
---

# {name}

{sentence}
{picture}
## How it was trained

{start}

| stage | tokens | FLOPs | seconds | result |
|---|---|---|---|---|
{stages}

{facts}

## Figures

{figures}

## Data

{data}

## How to use it

```python
{usage}
```

{end}
"""

PRETRAINING = {"clm": "pretrain_clm", "mlm": "pretrain_mlm", "span": "pretrain_span"}  # objective: stage
STAGES = {  # stage: (pipeline of the Hub, what it is called)
    "pretrain_clm": ("text-generation", "next-token prediction"),
    "pretrain_mlm": ("fill-mask", "masked-token prediction"),
    "pretrain_span": ("text2text-generation", "T5 style span corruption"),
    "sft": ("text-generation", "supervised fine-tuning"),
    "dpo": ("text-generation", "direct preference optimization"),
    "merge": ("text-generation", "merging the adapter into the model"),
    "classify": ("text-classification", "fine-tuning on labelled texts"),
    "tag": ("token-classification", "fine-tuning on tagged words"),
    "embed": ("sentence-similarity", "contrastive fine-tuning on pairs of sentences"),
}
UNITS = {"dpo": "pair", "classify": "text", "tag": "word", "embed": "pair"}  # what a loss is per, where not per token
TASKS = {  # figures of downstream stages, on validation data as eval_NAME and on test data as test_NAME
    "accuracy": "accuracy", "f1": "entity F1", "spearmanr": "Spearman's rho", "pearsonr": "Pearson's r",
    "macro_f1": "macro F1", "matthews_correlation": "Matthews correlation", "precision": "entity precision",
    "recall": "entity recall", "mse": "mean squared error",
}  # fmt: skip
EMBEDDINGS = {  # figures of sentence embeddings, on validation data
    "accuracy_at_1": "accuracy at 1", "mrr": "mean reciprocal rank", "spearmanr": "Spearman's rho",
}  # fmt: skip
METRICS = {  # metric: (its name in a card, format); the first two that a stage has are its result
    "preference_accuracy": ("preference accuracy", ".3f"),
    "reward_accuracy": ("reward accuracy", ".3f"),
    "reward_margin": ("reward margin", ".3f"),
    **{f"test_{key}": (f"test {label}", ".4f") for key, label in TASKS.items()},
    **{f"eval_{key}": (f"held-out {label}", ".4f") for key, label in TASKS.items()},
    **{key: (label, ".4f") for key, label in EMBEDDINGS.items()},
    "eval_loss": ("loss ({unit})", ".4f"),
    "restored_spans": ("spans restored word for word", ".3f"),
    "perplexity": ("perplexity", ".2f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "eval_loss_at_training_rate": ("loss at the masking rate of training (nats per target token)", ".4f"),
    "unigram_entropy": ("unigram entropy of the targets (nats)", ".4f"),
    "logits_difference": ("largest difference of a logit from the model with adapter", ".1e"),
}
USAGES = {  # pipeline of the Hub: how its models are used
    "text-generation": """generate = pipeline("text-generation", model="{name}")
print(generate({example}, max_new_tokens=50)[0]["generated_text"]{last})""",
    "fill-mask": """fill = pipeline("fill-mask", model="{name}")
for guess in fill({example}):
    print(guess["token_str"], guess["score"])""",
    "text2text-generation": """tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSeq2SeqLM.from_pretrained("{name}")
ids = tokenizer({example}, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))""",
    "text-classification": """classify = pipeline("text-classification", model="{name}")
print(classify({example}))""",
    "token-classification": """tag = pipeline("token-classification", model="{name}", aggregation_strategy="first")
for entity in tag({example}):
    print(entity["entity_group"], entity["word"], entity["score"])""",
    "sentence-similarity": """model = SentenceTransformer("{name}")
vectors = model.encode({example})
print(model.similarity(vectors, vectors))""",
}
IMPORTS = {"text2text-generation": "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer"}
IMPORTS |= {"sentence-similarity": "from sentence_transformers import SentenceTransformer"}
LIBRARIES = {"sentence-similarity": "sentence-transformers"}


def loss_unit(stage: str, metrics: dict) -> str:
    """What the loss of a stage (or objective) is measured in."""
    return "squared error" if "eval_mse" in metrics else f"nats per {UNITS.get(stage, 'target token')}"


def stages_of(lineage: dict) -> list[dict]:
    """The lineages of all stages, first to last."""
    parent = lineage.get("parent") or {}
    return [*(stages_of(parent["lineage"]) if parent.get("lineage") else []), lineage]


def write_card(folder: str, lineage: dict, example: str | list | dict, name: str | None = None) -> None:
    """Write `README.md`, the model card, from the lineage and what lies in the folder; nothing is left to fill in.

    Args:
        example: what the usage shows: a prompt, a sentence with the mask token or with sentinels, a text to classify or
            tag (a pair as {"text": ..., "text_pair": ...}), or a list of sentences to compare.
        name: what the folder will be called, where that is not yet its name.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    stages, plan = stages_of(lineage), lineage["plan"]
    task, description = STAGES[lineage["stage"]]
    root = stages[0].get("parent") or {}
    adapter = (folder / "adapter_config.json").exists()
    # Of files outside the repository only the last part of the path is known, which two sources may share.
    sources = {(source["path"], str(source.get("files"))): source
               for stage in stages for source in (stage.get("data") or {}).get("train") or []}  # fmt: skip
    licences = {source.get("licence") for source in sources.values()}
    hub_base = root.get("name_or_path") if "weights" not in root else None  # weights are hashed in local folders only
    front = {
        "library_name": "peft" if adapter else LIBRARIES.get(task, "transformers"),
        "pipeline_tag": task,
        "base_model": hub_base,
        "license": licences.pop() if len(licences) == 1 and not root else None,
        "datasets": [path for (path, _), source in sources.items() if "files" not in source],  # those of the Hub
        "tags": ["unlabeled", *dict.fromkeys(stage["stage"] for stage in stages)],
    }
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", front["license"] or ""):  # the Hub takes identifiers, not sentences
        front["license"] = None
    chat = task == "text-generation" and (folder / "chat_template.jinja").exists()
    message = [{"role": "user", "content": example}] if chat else example
    text = CARD.format(
        front=yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).strip(),
        name=name,
        sentence=_sentence(plan, [STAGES[stage["stage"]][1] for stage in stages], adapter),
        picture="\n![Loss against tokens](loss.png)\n" if (folder / "loss.png").exists() else "",
        start=f"Started from {_place(root['name_or_path'])}." if root else "Started from random weights.",
        stages="\n".join(_row(stage) for stage in stages),
        facts=_facts(lineage, description),
        figures=_figures(lineage),
        data="\n".join(f"- {_place(path)}, licence: {source.get('licence') or 'not stated'}"
                       for (path, _), source in sources.items()) or "No text of its own.",
        usage="# needs peft: this folder is an adapter\n" * adapter
        + f"{IMPORTS.get(task, 'from transformers import pipeline')}\n\n"
        + USAGES[task].format(
            name=name,
            example=json.dumps(message, ensure_ascii=False),
            last='[-1]["content"]' if chat else "",
        ),
        end="Samples are in `samples.md`. " * (folder / "samples.md").exists()
        + "Everything that determined this model (configuration, hashes of the text, versions, commit) is in "
        "`lineage.json`.",
    )  # fmt: skip
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def _place(name: str) -> str:
    """A name of the Hub, or of a file or folder without the directories of the machine."""
    return f"`{Path(name).name if os.path.isabs(name) else name}`"


def _sentence(plan: dict, descriptions: list[str], adapter: bool) -> str:
    size = f"of {plan['parameters'] / 1e6:,.1f} M parameters " if plan.get("parameters") else ""
    what = "An adapter for a language model" if adapter else "A language model"
    return f"{what} {size}trained by {', then '.join(descriptions)}."


def shown(stage: str, metrics: dict) -> list[tuple[str, str, str]]:
    """The metrics of a stage (or objective) that `METRICS` knows: (name, value, value before the stage or "")."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    unit, found = loss_unit(stage, metrics), []
    for key, (label, spec) in METRICS.items():
        if key in numbers:
            was = format(numbers[f"{key}_before"], spec) if f"{key}_before" in numbers else ""
            found.append((label.format(unit=unit), format(numbers[key], spec), was))
    return found


def _row(stage: dict) -> str:
    """A line of the table of stages; a dash where a stage has no such number."""
    numbers = {**stage["plan"], **stage["metrics"]}
    cells = [
        format(numbers[key], spec) if numbers.get(key) else "—"
        for key, spec in (("train_tokens", ",.0f"), ("flops", ".3g"), ("train_seconds", ",.0f"))
    ]
    result = ", ".join(
        f"{name} {value}" + (f" (before {was})" if was else "")
        for name, value, was in shown(stage["stage"], stage["metrics"])[:2]
    )
    return f"| {' | '.join([stage['stage'], *cells, result or '—'])} |"


def _facts(lineage: dict, description: str) -> str:
    """The last stage in a few lines."""
    plan = lineage["plan"]
    found = {
        "Last stage": description,
        "Parameters": f"{plan['parameters']:,}" if plan.get("parameters") else None,
        "Device": ", ".join(filter(None, (plan.get("device"), plan.get("precision")))),
        "Cost": describe_cost(lineage["metrics"]),
        "Versions": ", ".join(f"{package} {version}" for package, version in lineage["versions"].items()),
    }
    return "\n".join(f"- {key}: {value}" for key, value in found.items() if value)


def _figures(lineage: dict) -> str:
    """The table of the last stage's metrics, and what they were measured on."""
    held_out = ((lineage.get("data") or {}).get("splits") or {}).get("validation") or {}
    size = ", ".join(f"{held_out[key]:,} {key}" for key in ("documents", "bytes") if held_out.get(key))
    rows = shown(lineage["stage"], lineage["metrics"])
    before = any(was for *_, was in rows)
    head = "| figure of the last stage | |" + " before it |" * before + "\n|---|---|" + "---|" * before + "\n"
    head = (f"On held-out text ({size}):\n\n" if size else "") + head
    return head + "\n".join(f"| {name} | {value} |" + f" {was} |" * before for name, value, was in rows)
