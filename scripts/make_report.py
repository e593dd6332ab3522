"""Write the report of a chain: what each stage cost, what it learned and what it says, as one page that needs nothing.

    python scripts/make_report.py outputs/tiny-chain

Reads chain.json and what each stage left in its folder, writes report.html beside the last stage and prints its path.
The samples are kept in samples.json, so that a second report loads no model whose weights are the same.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from report_charts import charts, human, number, shares, total

from unlabeled import UserError, exit_on_user_error
from unlabeled.reporting.metrics import MetricText, describe_costs, describe_metrics
from unlabeled.reporting.stages import STAGE_KINDS
from unlabeled.runtime.files import read_json

NO_MODEL = ("tokenizer", "prepare", "evaluate", "push")  # their folders may hold another stage's model
NO_TRAINING = (*NO_MODEL, "merge")
MAX_NEW_TOKENS = 60
HUES = 8  # of the template


@dataclass
class Stage:
    """A stage of the chain with what it left behind; whatever is missing is empty."""

    name: str
    kind: str
    folder: Path | None
    seconds: float | None  # wall time of the whole stage
    metrics: dict
    lineage: dict
    history: list[dict]
    start: float = 0.0  # tokens trained on by the stages before
    hue: int = 0
    weights: dict[str, str] = field(default_factory=dict)  # sha256 of each file
    samples: list[str] = field(default_factory=list)  # one a prompt

    @property
    def trained(self) -> bool:
        return self.kind not in NO_TRAINING

    @property
    def tokens(self) -> float | None:
        logged = [tokens for entry in self.history if (tokens := number(entry, "tokens")) is not None]
        return number(self.metrics, "train_tokens", max(logged, default=None)) if self.trained else None

    @property
    def flops(self) -> float | None:
        return number(self.metrics, "flops") if self.trained else None

    @property
    def cost_seconds(self) -> float | None:
        """Wall time, or the seconds of training where the chain did not take it."""
        if self.seconds is not None or not self.trained:
            return self.seconds
        return number(self.metrics, "train_seconds")

    @property
    def plan(self) -> dict:
        return part(self.lineage, "plan")

    @property
    def git(self) -> dict:
        return part(self.lineage, "git")


def part(values: dict, key: str) -> dict:
    """A table within a table; empty where there is none."""
    return values[key] if isinstance(values.get(key), dict) else {}


def read(path: Path, kind: type) -> dict | list:
    """The JSON of a file; empty where it is missing, and where it is damaged, which is said."""
    try:
        value = read_json(path)
        if isinstance(value, kind):
            return value
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError):
        pass
    print(f"{path} is damaged and was left out", file=sys.stderr)
    return kind()


def read_chain(output_dir: Path) -> tuple[str, list[str], list[Stage]]:
    """The chain's name, prompts and stages. Raises `UserError` where chain.json does not tell them."""
    path = output_dir / "chain.json"
    remedy = "give the output folder of a chain that scripts/run_chain.py has run"
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    chain = read(path, dict)
    stages = chain.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{path} has no list of stages; {remedy}")
    found = [read_stage(output_dir, stage) for stage in stages]
    for i, stage in enumerate(found[1:]):
        stage.start = found[i].start + (found[i].tokens or 0)
    for hue, stage in enumerate(sorted(found, key=lambda stage: not stage.trained)):  # the clearest colours to training
        stage.hue = hue % HUES
    prompts = chain.get("prompts")
    prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    return str(chain.get("name") or output_dir.resolve().name), prompts, found


def read_stage(output_dir: Path, entry: dict) -> Stage:
    from unlabeled.reporting.lineage import weights_sha256

    folder = output_dir / str(entry["folder"]) if entry.get("folder") else None
    kind = str(entry.get("kind") or entry.get("name") or "stage")
    files = {"lineage": dict, "metrics": dict, "history": list}
    own = folder and kind != "push"  # which has the folder of the model that it pushed
    left = {key: read(folder / f"{key}.json", type_) if own else type_() for key, type_ in files.items()}
    left["history"] = [point for point in left["history"] if isinstance(point, dict)]
    weights = weights_sha256(str(folder)) if own and kind not in NO_MODEL else {}
    return Stage(str(entry.get("name") or kind), kind, folder, number(entry, "seconds"), **left, weights=weights)


# --- Samples --------------------------------------------------------------------------------------------------------


def add_samples(stages: list[Stage], prompts: list[str], cache: Path) -> None:
    """Give each stage that has a model its answers; only what is not in the cache is generated."""
    known, used = read(cache, dict), {}
    for stage in (stage for stage in stages if stage.weights and prompts):
        key = sample_key(stage, prompts)
        texts = known.get(key)
        if not isinstance(texts, list) or len(texts) != len(prompts):
            print(f"samples of {stage.name}", file=sys.stderr)
            try:
                texts = answers(stage.folder, prompts)
            except Exception as error:  # torn weights, a base model that is gone: the page is still worth having
                reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
                print(f"no samples of {stage.name}: {stage.folder} does not answer ({reason})", file=sys.stderr)
                continue
        used[key] = stage.samples = [str(text) for text in texts]
    if used and used != known:
        from unlabeled.runtime.files import write_json

        write_json(cache, used)


def sample_key(stage: Stage, prompts: list[str]) -> str:
    """sha256 of what the answers depend on: weights, template, prompts, length."""
    template = stage.folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.exists() else None
    return hashlib.sha256(json.dumps([stage.weights, chat, prompts, MAX_NEW_TOKENS]).encode()).hexdigest()


def answers(folder: Path, prompts: list[str]) -> list[str]:
    """What the model of a folder says to each prompt: its reply, its continuation, or the prompt with blanks filled."""
    from unlabeled.models.generation import fill_masks, fill_spans, load_for_generation, reply

    model, tokenizer, masked = load_for_generation(str(folder))
    blank = tokenizer.mask_token if masked else "_" if model.config.is_encoder_decoder else None
    if not blank:
        return [reply(model, tokenizer, prompt, max_new_tokens=MAX_NEW_TOKENS) for prompt in prompts]
    # A prompt without a mask gets one at its end.
    prompts = [re.sub(r"\[MASK\]|<mask>", blank, prompt) for prompt in prompts]
    prompts = [text if blank in text else f"{text} {blank}" for text in prompts]
    if masked:
        return [fill_masks(model, tokenizer, text).split("\n")[0] for text in prompts]
    return [fill_spans(model, tokenizer, text, max_new_tokens=MAX_NEW_TOKENS) for text in prompts]


# --- Words and numbers ----------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def sentence(stages: list[Stage]) -> str:
    size = next((n for stage in reversed(stages) if (n := number(stage.metrics, "parameters"))), None)
    costs = [(total([getattr(stage, unit.lower()) for stage in stages]), unit) for unit in ("tokens", "FLOPs")]
    spent = [f"{human(value)} {unit}" for value, unit in costs if value]
    seconds = total([stage.cost_seconds for stage in stages])
    spent += [duration(seconds)] if seconds else []
    devices = list(dict.fromkeys(str(stage.plan["device"]) for stage in stages if stage.plan.get("device")))
    return (
        f"A language model{f' of {human(size)} parameters' if size else ''} in {len(stages)} "
        f"stage{'s' * (len(stages) > 1)}: {listed([describe_kind(stage.kind) for stage in stages])}."
        + (f" It took {listed(spent)}{f' on {listed(devices)}' if devices else ''}." if spent else "")
    )


def ladder(stages: list[Stage]) -> dict:
    """The table of costs, with each stage's share of the whole, and what followed pretraining in one sentence."""
    flops, seconds = [stage.flops for stage in stages], [stage.cost_seconds for stage in stages]
    rows = list(zip(stages, shares(flops), shares(seconds), strict=True))
    after = [row for row in rows if row[0].trained and not row[0].kind.startswith("pretrain")]
    spent = [total([row[i] for row in after]) for i in (1, 2)]
    complete = all(stage.flops is not None for stage in stages if stage.trained)
    sums = {"tokens": total([stage.tokens for stage in stages]), "flops": total(flops), "seconds": total(seconds)}
    known = complete and len(after) < len([stage for stage in stages if stage.trained]) and None not in spent
    partly = [stage.name for stage in stages if stage.seconds is None and stage.cost_seconds is not None]
    after = spent if known else None
    return {"rows": rows, "sums": sums, "complete": complete, "after": after, "partly": partly}


def results(stage: Stage) -> list[MetricText]:
    """The results and costs of a stage, in the order of the page."""
    return describe_metrics(stage.kind, stage.metrics) + describe_costs(stage.kind, stage.metrics)


def describe_kind(kind: str) -> str:
    return STAGE_KINDS[kind].description if kind in STAGE_KINDS else kind


def sources(stages: list[Stage]) -> list[dict]:
    """Every source of data, with its files' hashes and the stages that read it."""
    found: dict[str, dict] = {}
    for stage in stages:
        data = part(stage.lineage, "data")
        for split, use in (("train", "training"), ("evaluation", "held out")):
            given = data.get(split) if isinstance(data.get(split), list) else []
            for source in (source for source in given if isinstance(source, dict) and source.get("path")):
                path = str(source["path"])
                name = Path(path).name if os.path.isabs(path) else path  # without the directories of the machine
                entry = found.setdefault(path, {"name": name, "uses": {}})
                entry |= {"licence": source.get("licence"), "files": part(source, "files")}
                entry["uses"][stage.name, use] = stage.hue
    return list(found.values())


def versions(stages: list[Stage]) -> dict[str, list[str]]:
    """The versions of packages, to the names of the stages that ran with them."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        if packages := part(stage.lineage, "versions"):
            text = ", ".join(f"{package} {version}" for package, version in packages.items())
            found.setdefault(text, []).append(stage.name)
    return found


# --- The page -------------------------------------------------------------------------------------------------------


def page(name: str, prompts: list[str], stages: list[Stage]) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"human": human, "duration": duration, "percent": percent, "listed": listed}
    return environment.get_template("report_template.html").render(
        name=name, sentence=sentence(stages), stages=stages, ladder=ladder(stages), charts=charts(stages),
        results=[(stage, found) for stage in stages if (found := results(stage))], prompts=prompts,
        max_new_tokens=MAX_NEW_TOKENS, traced=[stage for stage in stages if stage.lineage],
        sources=sources(stages), versions=versions(stages),
    )  # fmt: skip


def write_report(output_dir: Path) -> Path:
    """Write the page into the folder of the last stage that has one. Returns its path."""
    name, prompts, stages = read_chain(output_dir)
    folders = [stage.folder for stage in stages if stage.folder and stage.folder.is_dir()]
    if not folders:
        raise UserError(f"no stage of {output_dir / 'chain.json'} has a folder yet; run the chain first")
    path = folders[-1] / "report.html"
    try:
        add_samples(stages, prompts, output_dir / "samples.json")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(page(name, prompts, stages), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path} ({error.strerror}); make room, or make it writable"
        ) from error
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path, help="the output folder of a chain, which holds chain.json")
    print(write_report(parser.parse_args().output_dir))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
