"""The model card, `README.md`: written from the lineage, with nothing left to fill in."""

import json
import os
import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from unlabeled.planning import describe_cost
from unlabeled.reporting.lineage import list_stages
from unlabeled.reporting.metrics import describe_metrics, headline_metrics
from unlabeled.reporting.stages import STAGE_KINDS

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
HEADLINES = 2  # metrics of each stage in the table of stages
USAGES = {  # pipeline tag: how such a model is used
    "text-generation": """\
from transformers import pipeline

generate = pipeline("text-generation", model="$name")
print(generate($example, max_new_tokens=50)[0]["generated_text"]$last_message)""",
    "fill-mask": """\
from transformers import pipeline

fill = pipeline("fill-mask", model="$name")
for guess in fill($example):
    print(guess["token_str"], guess["score"])""",
    "text2text-generation": """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$name")
model = AutoModelForSeq2SeqLM.from_pretrained("$name")
ids = tokenizer($example, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))""",
    "text-classification": """\
from transformers import pipeline

classify = pipeline("text-classification", model="$name")
print(classify($example))""",
    "token-classification": """\
from transformers import pipeline

tag = pipeline("token-classification", model="$name", aggregation_strategy="first")
for entity in tag($example):
    print(entity["entity_group"], entity["word"], entity["score"])""",
    "sentence-similarity": """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("$name")
vectors = model.encode($example)
print(model.similarity(vectors, vectors))""",
}


def write_card(folder: str, lineage: dict, example: str | list | dict, name: str | None = None) -> None:
    """Write the model card of a folder.

    Args:
        folder: the folder of the model; its files decide what the card mentions.
        lineage: of `make_lineage`.
        example: the input of the usage example: a prompt, a sentence with the mask token or with sentinels, a text to
            classify or tag (a pair as {"text": ..., "text_pair": ...}), or a list of sentences to compare.
        name: the name of the folder, if it is to be renamed.
    """
    path = Path(folder)
    name = name or path.resolve().name
    stages = list_stages(lineage)
    root = stages[0].get("parent") or {}
    sources = list_sources(stages)
    metrics = describe_metrics(lineage["stage"], lineage["metrics"])
    card = ModelCard.from_template(
        card_metadata(path, stages, sources),
        template_path=str(TEMPLATE),
        name=name,
        sentence=describe_model(path, stages),
        has_loss_curve=(path / "loss.png").exists(),
        start=base_name(root["name_or_path"]) if root else None,
        stage_rows=[stage_row(stage) for stage in stages],
        facts=describe_last_stage(lineage),
        held_out_text=describe_held_out_text(lineage),
        metrics=metrics,
        has_values_before=any(metric.before for metric in metrics),
        sources=[
            {"name": base_name(source["path"]), "licence": source.get("licence") or "not stated"} for source in sources
        ],
        usage=usage_example(path, lineage["stage"], name, example),
        has_samples=(path / "samples.md").exists(),
    )
    card.save(path / "README.md")


def card_metadata(folder: Path, stages: list[dict], sources: list[dict]) -> ModelCardData:
    """The metadata by which the Hub finds and loads the model."""
    root = stages[0].get("parent") or {}
    task = STAGE_KINDS[stages[-1]["stage"]].pipeline_tag
    library = "sentence-transformers" if task == "sentence-similarity" else "transformers"
    licences = {source.get("licence") for source in sources}
    licence = licences.pop() if len(licences) == 1 and not root else None
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence or ""):  # the Hub takes identifiers only
        licence = None
    return ModelCardData(
        library_name="peft" if is_adapter(folder) else library,
        pipeline_tag=task,
        base_model=root.get("name_or_path") if "weights" not in root else None,  # local folders have hashed weights
        license=licence,
        datasets=[source["path"] for source in sources if "files" not in source] or None,  # those of the Hub
        tags=["unlabeled", *dict.fromkeys(stage["stage"] for stage in stages)],
    )


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def list_sources(stages: list[dict]) -> list[dict]:
    """The sources of training data of all stages, each once."""
    sources = {}
    for stage in stages:
        for source in (stage.get("data") or {}).get("train") or []:
            # Outside the repository only the last part of a path is known, and two sources may share it.
            sources[source["path"], str(source.get("files"))] = source
    return list(sources.values())


def base_name(path: str) -> str:
    """The name of a file or folder without the directories of the machine; names of the Hub stay as they are."""
    return Path(path).name if os.path.isabs(path) else path


def describe_model(folder: Path, stages: list[dict]) -> str:
    kind = "An adapter for a language model" if is_adapter(folder) else "A language model"
    parameters = stages[-1]["plan"].get("parameters")
    size = f" of {parameters / 1e6:,.1f}M parameters" if parameters else ""
    training = ", then ".join(STAGE_KINDS[stage["stage"]].description for stage in stages)
    return f"{kind}{size} trained by {training}."


def stage_row(stage: dict) -> list[str]:
    """The cells of a stage in the table of stages, with a dash for each number that it does not have."""
    numbers = {**stage["plan"], **stage["metrics"]}
    cells = [stage["stage"]]
    for key, spec in (("train_tokens", ",.0f"), ("flops", ".3g"), ("train_seconds", ",.0f")):
        cells.append(format(numbers[key], spec) if numbers.get(key) else "—")
    results = []
    for metric in headline_metrics(stage["stage"], stage["metrics"])[:HEADLINES]:
        before = f" (before {metric.before})" if metric.before else ""
        results.append(f"{metric.label} {metric.value}{before}")
    cells.append(", ".join(results) or "—")
    return cells


def describe_last_stage(lineage: dict) -> dict[str, str]:
    plan = lineage["plan"]
    facts = {
        "Last stage": STAGE_KINDS[lineage["stage"]].description,
        "Parameters": f"{plan['parameters']:,}" if plan.get("parameters") else "",
        "Device": ", ".join(filter(None, (plan.get("device"), plan.get("precision")))),
        "Cost": describe_cost(lineage["metrics"]),
        "Versions": ", ".join(f"{package} {version}" for package, version in lineage["versions"].items()),
    }
    return {name: value for name, value in facts.items() if value}


def describe_held_out_text(lineage: dict) -> str:
    splits = (lineage.get("data") or {}).get("splits") or {}
    counts = splits.get("validation") or {}
    return ", ".join(f"{counts[key]:,} {key}" for key in ("documents", "bytes") if counts.get(key))


def usage_example(folder: Path, stage: str, name: str, example: Any) -> str:
    """Python code that loads the model and calls it."""
    task = STAGE_KINDS[stage].pipeline_tag
    is_chat = task == "text-generation" and (folder / "chat_template.jinja").exists()
    code = Template(USAGES[task]).substitute(
        name=name,
        example=json.dumps([{"role": "user", "content": example}] if is_chat else example, ensure_ascii=False),
        last_message='[-1]["content"]' if is_chat else "",
    )
    return f"# needs peft: this folder is an adapter\n{code}" if is_adapter(folder) else code
