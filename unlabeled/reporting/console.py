"""The data before training and the result after it, in lines for the terminal."""

from unlabeled.data.files import describe_skipped
from unlabeled.reporting.lineage import shown


def describe(manifest: dict) -> str:
    """The manifest in a few lines for the terminal."""
    lines = []
    for name, split in manifest["splits"].items():
        unknown = split["unknown_tokens"] / split["text_tokens"]
        lines.append(
            f"{name:<11}{split['documents']:>9,} documents {split['bytes'] / 1e6:>10,.2f} MB"
            f" {split['text_tokens']:>13,} tokens"
            f" {split['rows']:>10,} rows of {manifest['max_length']}, {split['packing_efficiency']:.2%} full"
            + (f", {unknown:.2%} of the tokens unknown to the tokenizer" if unknown else "")
            + (f", {split['targets']:,} learned" if manifest["objective"] == "sft" else "")
        )
        if split.get("left_out"):
            lines.append(f"{'':<11}left out: {describe_left_out(split)}")
        if cut := split.get("rearranged"):
            lines.append(
                f"{'':<11}{cut['documents']:>9,} documents, {cut['text_tokens'] / split['text_tokens']:.1%} of the"
                f" tokens, rearranged to fill in the middle, in {cut['pieces']:,} pieces"
            )
    lines += [f"{name}: {line}" for name, line in describe_sources(manifest).items()]
    if "target_length" in manifest:
        lines.append(
            f"a text of {manifest['raw_length']} tokens becomes {manifest['max_length']} inputs and "
            f"{manifest['target_length']} targets"
        )
    if len(manifest["sources"]) > 1:
        total = sum(source["tokens"] for source in manifest["sources"])
        lines += [
            f"  {source['tokens'] / total:>6.1%} of the tokens from {source['path']}" for source in manifest["sources"]
        ]
    if manifest["splits"].get("train", {}).get("estimated"):
        lines.append("the training text is a stream, read while it trains: its counts are guessed from its beginning")
    else:
        rate = manifest["seconds_per_million_tokens"]
        lines.append(f"prepared in {manifest['seconds']:.1f} s, {rate:.2f} s per million tokens")
    return "\n".join(lines)


LEFT_OUT_WARNING = 0.01  # share of the documents above which the plan warns


def describe_left_out(split: dict) -> str:
    """How many documents of a split are left out, by reason."""
    share = left_out_share(split)
    return f"{count_by_reason(split['left_out'])} ({share:.2%})"


def count_by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def left_out_share(split: dict) -> float:
    """The share of the documents of a split that are left out."""
    count = sum(split.get("left_out", {}).values())
    return count / max(count + split["documents"], 1)


def describe_sources(manifest: dict) -> dict[str, str]:
    """Lines on the files that are not read, and on the rows that are changed, where there are any."""
    lines = {}
    if manifest.get("skipped_files"):
        lines["not read"] = describe_skipped(manifest["skipped_files"])
    if manifest.get("repaired"):
        lines["repaired"] = ", ".join(
            f"{reason} became U+FFFD in {count:,} rows" for reason, count in manifest["repaired"].items()
        )
    return lines


def data_warnings(manifest: dict, rows_per_step: int, unit: str) -> list[str]:
    """What a person should know of the data before training."""
    train, warnings = manifest["splits"]["train"], []
    if train["rows"] < rows_per_step:
        warnings.append(
            f"the text fills {train['rows']} rows and a batch takes {rows_per_step}: each batch repeats the text "
            f"{rows_per_step / train['rows']:.1f} times; add text, or lower batch_{unit}"
        )
    documents = "documents" if unit == "tokens" else unit
    for name, split in manifest["splits"].items():
        if left_out_share(split) > LEFT_OUT_WARNING:
            warnings.append(
                f"{left_out_share(split):.1%} of the {name} {documents} are left out: "
                f"{count_by_reason(split['left_out'])}"
            )
    return warnings


def summary(objective: str, metrics: dict) -> str:
    """What a run has reached, in one line: the figures that it has."""
    aside, parts = f"unigram entropy {metrics.get('unigram_entropy', 0):.4f}" * ("unigram_entropy" in metrics), []
    for name, value, was in shown(objective, {k: v for k, v in metrics.items() if k != "unigram_entropy"}):
        loss = name.startswith("loss (")
        before, name = f"before {was}" if was else aside * loss, "held-out loss" if loss else name
        said = f"{value} {name}" if name == "bits per byte" else f"{name} {value}"
        parts.append(said + (f" ({before})" if before else ""))
    return ", ".join(parts)
