"""Check, or rewrite, the figures and console excerpts that documents take from benchmarks/results/tiny_recipes.json.

    python -m benchmarks.documented_figures           # list those that differ; the exit status is then 1
    python -m benchmarks.documented_figures --write   # write the recorded values into README, docs and YAML comments

In README, a comment `<!-- recorded: NAME -->` before a code block names the excerpt that the block holds.

Run it after `python -m benchmarks.tiny_recipes`. `tests/test_figures.py` runs the check.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/tiny_recipes.json"
TINY = "recipes/configs/tiny"
README = ROOT / "README.md"
PREFERRED = "chain/stages/dpo/metrics/preference_accuracy"
FIRST_REPORTED_STEP = 20  # logging_steps of tiny/pretrain_clm
SAMPLE_LINES = 7  # of the first sample


@dataclass(frozen=True)
class Figure:
    """A number in a document.

    Attributes:
        document: path from the root of the repository.
        pattern: a regular expression whose only group is the number.
        value: where the results have it: keys from the top down, separated by "/".
        form: how the document writes it, a format specification.
        scale: what the recorded value is multiplied by, 100 for a percentage.
    """

    document: str
    pattern: str
    value: str
    form: str
    scale: float = 1.0


def training_seconds(stage: str, path: str) -> Figure:
    """The seconds of training in the first lines of a tiny configuration."""
    return Figure(f"{TINY}/{stage}.yaml", r"([\d,]+) s of training", f"{path}/metrics/train_seconds", ",.0f")


# fmt: off
METRICS = [
    Figure("README.md", r"\*\*([\d.]+) bits per byte on three held-out", "pretrain_clm/metrics/bits_per_byte", ".2f"),
    Figure("README.md", r"held-out plays, after (\d+) s of training", "pretrain_clm/metrics/train_seconds", ".0f"),
    Figure("README.md", r"ranks (\d+) % of the", PREFERRED, ".0f", 100),
    Figure("README.md", r"pairs correctly, (\d+) % before", f"{PREFERRED}_before", ".0f", 100),
    Figure("docs/pretraining.md", r"masked loss ([\d.]+) against", "pretrain_mlm/metrics/eval_loss", ".2f"),
    Figure("docs/pretraining.md", r"unigram entropy of ([\d.]+), after", "pretrain_mlm/metrics/unigram_entropy", ".2f"),
    Figure("docs/pretraining.md", r", after (\d+) s of training\.\n", "pretrain_mlm/metrics/train_seconds", ".0f"),
    Figure("docs/pretraining.md", r"tiny model reaches ([\d.]+) nats", "pretrain_span/metrics/eval_loss", ".2f"),
    Figure("docs/pretraining.md", r"nats \(unigram entropy ([\d.]+)\)", "pretrain_span/metrics/unigram_entropy", ".2f"),
    Figure("docs/pretraining.md", r"\) after (\d+) s of training\nand", "pretrain_span/metrics/train_seconds", ".0f"),
    Figure("docs/pretraining.md", r"restores ([\d.]+) % of", "pretrain_span/metrics/restored_spans", ".1f", 100),
    Figure("docs/pretraining.md", r"\n([\d.]+) bits per byte from", "half_budget_fim/metrics/bits_per_byte", ".3f"),
    Figure("docs/pretraining.md", r"with it and ([\d.]+) without", "half_budget/metrics/bits_per_byte", ".3f"),
    Figure("docs/downstream.md", r"takes (\d+) s of training \(test", "classify/metrics/train_seconds", ".0f"),
    Figure("docs/downstream.md", r"\(test accuracy ([\d.]+)\)", "classify/metrics/test_accuracy", ".2f"),
    Figure("docs/downstream.md", r"consecutive verses\n(\d+) s,", "embed/metrics/train_seconds", ".0f"),
    Figure("docs/downstream.md", r"a test F1 of ([\d.]+)\.", "tag/metrics/test_f1", ".2f"),
    Figure("docs/data.md", r"ends at\n([\d.]+) bits per byte instead", "stream/metrics/bits_per_byte", ".2f"),
    Figure("docs/data.md", r"bits per byte instead of ([\d.]+), with", "pretrain_clm/metrics/bits_per_byte", ".2f"),
    Figure("docs/chains.md", r"ranks (\d+) % of the pairs", PREFERRED, ".0f", 100),
    Figure("docs/chains.md", r"after `dpo`, (\d+) % before", f"{PREFERRED}_before", ".0f", 100),
    Figure("docs/chains.md", r"SFT, DPO \| ([\d,]+) s on two", "chain/seconds", ",.0f"),
    Figure("recipes/chains/tiny.yaml", r"([\d,]+) s in all", "chain/seconds", ",.0f"),
    training_seconds("pretrain_clm", "pretrain_clm"),
    Figure(f"{TINY}/pretrain_clm.yaml", r"([\d.]+) bits per byte", "pretrain_clm/metrics/bits_per_byte", ".3f"),
    Figure(f"{TINY}/pretrain_clm.yaml", r"([\d,]+) tokens/s", "pretrain_clm/metrics/tokens_per_second", ",.0f"),
    training_seconds("pretrain_mlm", "pretrain_mlm"),
    Figure(f"{TINY}/pretrain_mlm.yaml", r"masked loss ([\d.]+) at", "pretrain_mlm/metrics/eval_loss", ".3f"),
    Figure(f"{TINY}/pretrain_mlm.yaml", r"unigram entropy ([\d.]+)", "pretrain_mlm/metrics/unigram_entropy", ".3f"),
    Figure(f"{TINY}/pretrain_mlm.yaml", r"([\d,]+) tokens/s", "pretrain_mlm/metrics/tokens_per_second", ",.0f"),
    training_seconds("pretrain_span", "pretrain_span"),
    Figure(f"{TINY}/pretrain_span.yaml", r"held-out loss ([\d.]+) per", "pretrain_span/metrics/eval_loss", ".3f"),
    Figure(f"{TINY}/pretrain_span.yaml", r"unigram entropy ([\d.]+)", "pretrain_span/metrics/unigram_entropy", ".3f"),
    Figure(f"{TINY}/pretrain_span.yaml", r"([\d,]+) tokens/s", "pretrain_span/metrics/tokens_per_second", ",.0f"),
    training_seconds("classify", "classify"),
    Figure(f"{TINY}/classify.yaml", r"test accuracy ([\d.]+)", "classify/metrics/test_accuracy", ".2f"),
    training_seconds("tag", "tag"),
    Figure(f"{TINY}/tag.yaml", r"entity F1 ([\d.]+)", "tag/metrics/test_f1", ".2f"),
    training_seconds("embed", "embed"),
    Figure(f"{TINY}/embed.yaml", r"([\d.]+) % of the anchors", "embed/metrics/accuracy_at_1", ".1f", 100),
    Figure(f"{TINY}/embed.yaml", r"rank ([\d.]+) before", "embed/metrics/mrr_before", ".3f"),
    Figure(f"{TINY}/embed.yaml", r"before, ([\d.]+) after", "embed/metrics/mrr", ".3f"),
    training_seconds("sft", "chain/stages/sft"),
    Figure(f"{TINY}/sft.yaml", r"held-out loss ([\d.]+) before", "chain/stages/sft/metrics/eval_loss_before", ".3f"),
    Figure(f"{TINY}/sft.yaml", r"before and ([\d.]+) after", "chain/stages/sft/metrics/eval_loss", ".3f"),
    Figure(f"{TINY}/sft.yaml", r"([\d,]+) tokens/s", "chain/stages/sft/metrics/tokens_per_second", ",.0f"),
    training_seconds("dpo", "chain/stages/dpo"),
    Figure(f"{TINY}/dpo.yaml", r"held-out loss ([\d.]+) before", "chain/stages/dpo/metrics/eval_loss_before", ".3f"),
    Figure(f"{TINY}/dpo.yaml", r"before and ([\d.]+) after", "chain/stages/dpo/metrics/eval_loss", ".3f"),
    Figure(f"{TINY}/dpo.yaml", r"(\d+) % and \d+ % of the pairs", f"{PREFERRED}_before", ".0f", 100),
    Figure(f"{TINY}/dpo.yaml", r"\d+ % and (\d+) % of the pairs", PREFERRED, ".0f", 100),
]
# fmt: on


def recorded(results: dict, figure: Figure) -> str:
    """The value of a figure as its document should write it."""
    value = results
    for key in figure.value.split("/"):
        value = value[key]
    return format(value * figure.scale, figure.form)


def excerpts(results: dict) -> dict[str, str]:
    """The console output that README quotes, by the name of the excerpt.

    `pretrain_clm` leaves out the progress lines between every hundredth step, `sample` is the beginning of the first
    sample, and `chain` the table at the end of the chain.
    """
    console = results["pretrain_clm"]["console"]
    first_line = next(index for index, line in enumerate(console) if line.startswith("  model "))
    last_line = next(index for index, line in enumerate(console) if line.startswith("everything is in"))
    run = [line for line in console[first_line : last_line + 1] if line.strip() and not is_intermediate_step(line)]
    sample_start = console.index("```text") + 1
    chain = results["chain"]["console"]
    table_start = next(index for index, line in enumerate(chain) if line.startswith("  stage "))
    table_end = chain.index("", table_start)
    selected = {
        "pretrain_clm": run,
        "sample": console[sample_start : sample_start + SAMPLE_LINES],
        "chain": chain[table_start:table_end],
    }
    return {name: "\n".join(line.rstrip() for line in lines) + "\n" for name, lines in selected.items()}


def is_intermediate_step(line: str) -> bool:
    """Whether a line reports a step that is neither the first reported one nor a multiple of a hundred."""
    match = re.match(r"step +(\d+)/", line)
    return match is not None and int(match[1]) != FIRST_REPORTED_STEP and int(match[1]) % 100 != 0


def excerpt_pattern(name: str) -> str:
    """A regular expression for a marked code block, whose only group is its content."""
    return rf"<!-- recorded: {name} -->\n+```text\n(.*?)```"


def differences(results: dict) -> list[str]:
    """A sentence for each figure or excerpt that its document lacks or writes differently."""
    sentences = []
    for figure in METRICS:
        match = re.search(figure.pattern, (ROOT / figure.document).read_text(encoding="utf-8"))
        expected = recorded(results, figure)
        if match is None:
            sentences.append(f"{figure.document} has no figure that matches {figure.pattern!r} ({expected})")
        elif match[1] != expected:
            sentences.append(f"{figure.document} says {match[0]!r}, and {figure.value} is {expected}")
    readme = README.read_text(encoding="utf-8")
    for name, expected in excerpts(results).items():
        match = re.search(excerpt_pattern(name), readme, re.S)
        if match is None or match[1] != expected:
            sentences.append(f"{README.name} lacks the recorded console output of {name}")
    return sentences


def write(results: dict) -> None:
    """Put the recorded figures and excerpts into the documents."""
    for figure in METRICS:
        replace_group(ROOT / figure.document, figure.pattern, recorded(results, figure))
    for name, text in excerpts(results).items():
        replace_group(README, excerpt_pattern(name), text)


def replace_group(file: Path, pattern: str, replacement: str) -> None:
    """Replace what the only group of a regular expression matches first in a file, if anything."""
    text = file.read_text(encoding="utf-8")
    match = re.search(pattern, text, re.S)
    if match is not None:
        start, end = match.span(1)
        file.write_text(text[:start] + replacement + text[end:], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the recorded values into the documents")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if options.write:
        write(results)
    sentences = differences(results)
    print("\n".join(sentences) or f"{len(METRICS)} figures are those of {RESULTS.relative_to(ROOT)}")
    if sentences:
        sys.exit(1)


if __name__ == "__main__":
    main()
