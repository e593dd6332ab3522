"""The results of the GPU benchmark, and the Markdown tables of them."""

import json
from pathlib import Path
from typing import Any

SECTIONS = ("machine", "head", "attention", "optimizer", "compilations", "loop", "recipe", "stock", "resume")
MAX_LIST_ITEMS = 20
MAX_ITEM_CHARACTERS = 700


class Results:
    """Collects the values of all pieces in `results.jsonl`, to which their processes append a line each.

    Args:
        about: the machine, the versions and the command.
    """

    def __init__(self, folder: Path, about: dict):
        self.folder = folder
        self.about = about
        self.file = folder / "results.jsonl"

    def record(self, section: str, name: str, **values) -> None:
        """Append an entry; values that are None are left out."""
        entry = {"section": section, "name": name}
        entry |= {key: value for key, value in values.items() if value is not None}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=str) + "\n")

    def entries(self) -> list[dict]:
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]

    def write(self) -> None:
        """Write `results.json` and `results.md` with all entries so far."""
        entries = self.entries()
        content = json.dumps({"about": self.about, "results": entries}, indent=1)
        (self.folder / "results.json").write_text(content + "\n", encoding="utf-8")
        lines = [f"- {key}: {value}" for key, value in self.about.items()]
        for section in SECTIONS:
            section_entries = [entry for entry in entries if entry["section"] == section]
            if section_entries:
                lines += ["", f"## {section}", "", *make_table(section_entries)]
        (self.folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def format_value(value: Any) -> str:
    """A value as it is written in the tables."""
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def format_cell(entry: dict, column: str) -> str:
    if column not in entry:
        return ""
    if column == "mfu":
        return f"{entry[column]:.1%}"
    return format_value(entry[column])


def make_table(entries: list[dict]) -> list[str]:
    """Lines of Markdown: a table of all single values; errors, notes, lists and mappings below it."""
    not_columns = ("section", "name", "error", "note")
    columns = []
    for entry in entries:
        for key, value in entry.items():
            if key not in columns and key not in not_columns and not isinstance(value, list | dict):
                columns.append(key)
    lines = []
    if columns:
        lines += [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for entry in entries:
        if any(column in entry for column in columns):
            cells = [format_cell(entry, column) for column in columns]
            lines.append(f"| {format_value(entry['name'])} | {' | '.join(cells)} |")
    for entry in entries:
        lines += describe_details(entry)
    return lines


def describe_details(entry: dict) -> list[str]:
    """Lines of Markdown about the error, the note, the lists and the mappings of an entry."""
    lines = []
    for key, value in entry.items():
        if key in ("error", "note"):
            lines += ["", f"**{entry['name']}: {key}**: {format_value(value)}"]
        elif isinstance(value, dict) and value:
            lines += ["", f"{entry['name']}, {key}:"]
            lines += [f"- `{name}`: {format_value(item)}" for name, item in value.items()]
        elif isinstance(value, list) and value:
            lines += ["", f"{entry['name']}, {key}:"]
            lines += [f"- {format_value(item)[:MAX_ITEM_CHARACTERS]}" for item in value[:MAX_LIST_ITEMS]]
    return lines
