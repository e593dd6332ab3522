"""The manifest of a data set as lines for the terminal, and warnings about it."""

from collections.abc import Mapping

from unlabeled.data.files import describe_skipped

LEFT_OUT_WARNING = 0.01  # share of the documents above which the run plan warns


def describe_dataset(manifest: dict) -> str:
    """The manifest of prepared text or conversations, in a few lines."""
    lines: list[str] = []
    for name, counts in manifest["splits"].items():
        lines += _describe_split(name, counts, manifest)
    lines += [f"{name}: {line}" for name, line in describe_sources(manifest).items()]
    if "target_length" in manifest:
        lines.append(
            f"a text of {manifest['raw_length']} tokens becomes {manifest['max_length']} inputs and "
            f"{manifest['target_length']} targets"
        )
    sources = manifest["sources"]
    if len(sources) > 1:
        total = sum(source["tokens"] for source in sources)
        lines += [f"  {source['tokens'] / total:>6.1%} of the tokens from {source['path']}" for source in sources]
    if manifest["splits"].get("train", {}).get("estimated"):
        lines.append("the training text is streamed during training: its counts are estimated from its first documents")
    else:
        rate = manifest["seconds_per_million_tokens"]
        lines.append(f"prepared in {manifest['seconds']:.1f} s, {rate:.2f} s per million tokens")
    return "\n".join(lines)


def _describe_split(name: str, counts: dict, manifest: dict) -> list[str]:
    line = (
        f"{name:<11}{counts['documents']:>9,} documents {counts['bytes'] / 1e6:>10,.2f} MB"
        f" {counts['text_tokens']:>13,} tokens"
        f" {counts['rows']:>10,} rows of {manifest['max_length']}, {counts['packing_efficiency']:.2%} full"
    )
    if counts["unknown_tokens"]:
        line += f", {counts['unknown_tokens'] / counts['text_tokens']:.2%} of the tokens unknown to the tokenizer"
    if manifest["objective"] == "sft":
        line += f", {counts['targets']:,} learned"
    lines = [line]
    if counts.get("left_out"):
        lines.append(f"{'':<11}left out: {describe_left_out(counts)}")
    rearranged = counts.get("rearranged")
    if rearranged:
        lines.append(
            f"{'':<11}{rearranged['documents']:>9,} documents, "
            f"{rearranged['text_tokens'] / counts['text_tokens']:.1%} of the tokens, rearranged to fill in the middle, "
            f"in {rearranged['pieces']:,} pieces"
        )
    return lines


def describe_left_out(counts: dict) -> str:
    """How many documents of a split are left out, by reason, and their share.

    Args:
        counts: of one split, as in the manifest.
    """
    return f"{count_by_reason(counts['left_out'])} ({left_out_share(counts):.2%})"


def count_by_reason(counts: Mapping[str, int]) -> str:
    """The counts by reason, separated by commas."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def left_out_share(counts: dict) -> float:
    """The share of the documents of a split that are left out."""
    left_out = sum(counts.get("left_out", {}).values())
    return left_out / max(left_out + counts["documents"], 1)


def describe_sources(manifest: dict) -> dict[str, str]:
    """Named lines about files that are not read and rows that were repaired; empty if there are none."""
    lines = {}
    if manifest.get("skipped_files"):
        lines["not read"] = describe_skipped(manifest["skipped_files"])
    if manifest.get("repaired"):
        lines["repaired"] = ", ".join(
            f"{reason} became U+FFFD in {count:,} rows" for reason, count in manifest["repaired"].items()
        )
    return lines


def data_warnings(manifest: dict, rows_per_step: int, unit: str) -> list[str]:
    """Warnings about the data for the run plan: too little for a batch, or many documents left out.

    Args:
        manifest: of the data set.
        rows_per_step: rows in a batch over all processes.
        unit: what the budget counts: tokens, examples or pairs.
    """
    warnings = []
    rows = manifest["splits"]["train"]["rows"]
    if rows < rows_per_step:
        warnings.append(
            f"the text fills {rows} rows and a batch takes {rows_per_step}: each batch repeats the text "
            f"{rows_per_step / rows:.1f} times; add text, or lower batch_{unit}"
        )
    documents = "documents" if unit == "tokens" else unit
    for name, counts in manifest["splits"].items():
        share = left_out_share(counts)
        if share > LEFT_OUT_WARNING:
            warnings.append(
                f"{share:.1%} of the {name} {documents} are left out: {count_by_reason(counts['left_out'])}"
            )
    return warnings
