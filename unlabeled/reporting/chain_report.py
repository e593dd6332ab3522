"""The report of a chain: what each stage cost, learned and generates, as one HTML page without external files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlabeled.errors import UserError
from unlabeled.planning import format_duration
from unlabeled.reporting.chain_charts import draw_charts, format_large_count
from unlabeled.reporting.chain_samples import MAX_NEW_TOKENS, add_samples
from unlabeled.reporting.chain_stages import ReportStage, number, read_chain, table
from unlabeled.reporting.metrics import describe_costs, describe_metrics

TEMPLATES = Path(__file__).parent / "templates"


def write_report(output_dir: Path) -> Path:
    """Write report.html into the folder of the last stage that has one.

    Args:
        output_dir: the folder of a chain.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder is not that of a chain, or the page cannot be written.
    """
    name, prompts, stages = read_chain(output_dir)
    folders = [stage.folder for stage in stages if stage.folder and stage.folder.is_dir()]
    if not folders:
        raise UserError(f"no stage of {output_dir / 'chain.json'} has a folder yet; run the chain first")
    path = folders[-1] / "report.html"
    try:
        add_samples(stages, prompts, output_dir / "samples.json")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(render_page(name, prompts, stages), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path} ({error.strerror}); make room, or make it writable"
        ) from error
    return path


def render_page(name: str, prompts: list[str], stages: list[ReportStage]) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "count": format_large_count,
        "duration": format_duration,
        "percent": format_percent,
        "join_words": join_words,
    }
    results = []
    for stage in stages:
        metrics = describe_metrics(stage.kind, stage.metrics) + describe_costs(stage.kind, stage.metrics)
        if metrics:
            results.append((stage, metrics))
    return environment.get_template("report.html").render(
        name=name,
        summary=summarize_chain(stages),
        stages=stages,
        costs=compute_costs(stages),
        charts=draw_charts(stages),
        results=results,
        prompts=prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        traced=[stage for stage in stages if stage.lineage],
        sources=list_sources(stages),
        versions=list_versions(stages),
    )


# --- Costs ------------------------------------------------------------------------------------------------------------


@dataclass
class ChainCosts:
    """The table of costs.

    Attributes:
        rows: each stage with its shares of the FLOPs and of the time of the whole chain.
        tokens, flops, seconds: the sums.
        has_all_flops: whether every stage that was trained reports its FLOPs.
        after_pretraining: the shares of the FLOPs and of the time of all stages after pretraining; None if unknown.
        training_time_only: names of the stages whose wall-clock time was not measured.
    """

    rows: list[tuple[ReportStage, float | None, float | None]]
    tokens: float | None
    flops: float | None
    seconds: float | None
    has_all_flops: bool
    after_pretraining: tuple[float, float] | None
    training_time_only: list[str]


def compute_costs(stages: list[ReportStage]) -> ChainCosts:
    flops = [stage.flops for stage in stages]
    seconds = [stage.cost_seconds for stage in stages]
    rows = list(zip(stages, shares(flops), shares(seconds), strict=True))
    trained_rows = [row for row in rows if row[0].is_trained]
    later_rows = [row for row in trained_rows if not row[0].kind.startswith("pretrain")]
    has_all_flops = all(stage.flops is not None for stage, _, _ in trained_rows)
    after_pretraining = None
    if has_all_flops and len(later_rows) < len(trained_rows):
        later_flops = total([row[1] for row in later_rows])
        later_seconds = total([row[2] for row in later_rows])
        if later_flops is not None and later_seconds is not None:
            after_pretraining = (later_flops, later_seconds)
    return ChainCosts(
        rows=rows,
        tokens=total([stage.tokens for stage in stages]),
        flops=total(flops),
        seconds=total(seconds),
        has_all_flops=has_all_flops,
        after_pretraining=after_pretraining,
        training_time_only=[stage.name for stage in stages if stage.seconds is None and stage.cost_seconds is not None],
    )


def total(values: list[float | None]) -> float | None:
    """The sum of the known values, None if none is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def shares(values: list[float | None]) -> list[float | None]:
    """Each value divided by the sum of the known values; None for an unknown value, or if the sum is 0."""
    whole = total(values)
    return [value / whole if whole and value is not None else None for value in values]


# --- Words ------------------------------------------------------------------------------------------------------------


def format_percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def join_words(words: list[str]) -> str:
    """A list of words as English has it: "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def summarize_chain(stages: list[ReportStage]) -> str:
    """The first sentences of the page: the size of the model, the stages and their cost."""
    sizes = [size for stage in stages if (size := number(stage.metrics, "parameters"))]
    model = f"A language model of {format_large_count(sizes[-1])} parameters" if sizes else "A language model"
    plural = "" if len(stages) == 1 else "s"
    kinds = join_words([stage.description for stage in stages])
    summary = f"{model} in {len(stages)} stage{plural}: {kinds}."
    costs = compute_costs(stages)
    parts = []
    if costs.tokens:
        parts.append(f"{format_large_count(costs.tokens)} tokens")
    if costs.flops:
        parts.append(f"{format_large_count(costs.flops)} FLOPs")
    if costs.seconds:
        parts.append(format_duration(costs.seconds))
    if parts:
        devices = list(dict.fromkeys(str(stage.plan["device"]) for stage in stages if stage.plan.get("device")))
        hardware = f" on {join_words(devices)}" if devices else ""
        summary += f" It took {join_words(parts)}{hardware}."
    return summary


# --- Provenance -------------------------------------------------------------------------------------------------------


def list_sources(stages: list[ReportStage]) -> list[dict[str, Any]]:
    """Every source of data with the hashes of its files, and the stages that read it."""
    sources: dict[str, dict] = {}
    for stage in stages:
        data = table(stage.lineage, "data")
        for split, use in (("train", "training"), ("evaluation", "evaluation")):
            recorded = data.get(split) if isinstance(data.get(split), list) else []
            for source in recorded:
                if not isinstance(source, dict) or not source.get("path"):
                    continue
                path = str(source["path"])
                name = Path(path).name if os.path.isabs(path) else path  # without the directories of the machine
                listed = sources.setdefault(path, {"name": name, "uses": {}})
                listed["licence"] = source.get("licence")
                listed["files"] = table(source, "files")
                listed["uses"][stage.name, use] = stage.color
    return list(sources.values())


def list_versions(stages: list[ReportStage]) -> dict[str, list[str]]:
    """The names of the stages by the versions of the packages with which they ran."""
    stages_by_versions: dict[str, list[str]] = {}
    for stage in stages:
        packages = table(stage.lineage, "versions")
        if packages:
            text = ", ".join(f"{package} {version}" for package, version in packages.items())
            stages_by_versions.setdefault(text, []).append(stage.name)
    return stages_by_versions
