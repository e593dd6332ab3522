"""What a plan starts from: a device, a law, a text; the YAML of a recipe is in plan_config.py."""

import argparse
import csv
import json
import os
from pathlib import Path

from unlabeled import UserError
from unlabeled.data.files import file_compression, file_format, find_files, open_file
from unlabeled.data.parquet_rows import open_parquet
from unlabeled.data.readers import DELIMITERS, read_file, text_of
from unlabeled.data.sources import Source
from unlabeled.planning.devices import find_device
from unlabeled.planning.scaling_laws import LAWS, ScalingLaw, bootstrap, fit, intervals, load_law, read_runs
from unlabeled.runtime.files import read_json

BYTES_PER_TOKEN = 4.0  # where no tokenizer was named; English in vocabularies of 32,000 to 50,000
SAMPLE = 1_000_000  # bytes of text that are tokenised to measure it


def hardware_of(args: argparse.Namespace) -> dict | None:
    """Name, FLOPs per second of one device in use, memory in GB, or None where no device was named.

    Of a CPU only its name: what it computes a second depends on the model, so time takes --measured.
    """
    if args.measured:
        try:
            metrics = read_json(Path(args.measured, "metrics.json"))
            run = read_json(Path(args.measured, "lineage.json"))["plan"]
            speed = metrics["flops"] / metrics["train_seconds"] / run["world_size"]
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise UserError(f"--measured {args.measured} is not the folder of a finished run ({error!r})") from error
        found = {"device": run["device"], "flops_per_second": speed, "measured": args.measured}
        args.precision = run["precision"]
        try:
            return found | {"gigabytes": find_device(run["device"]).gigabytes}
        except UserError:
            return found
    if not args.device:
        return None
    if args.device.lower() == "cpu":
        return {"device": "cpu"}
    device = find_device(args.device)
    peak = device.peak(args.precision)
    if peak is None:
        raise UserError(f"--device {device.name} has no unit for {args.precision}; set --precision fp32")
    return {"device": device.name, "flops_per_second": args.mfu * peak, "mfu": args.mfu, "peak_flops": peak,
            "gigabytes": device.gigabytes, "gigabytes_per_second": device.gigabytes_per_second}  # fmt: skip


def law_of(args: argparse.Namespace) -> tuple[ScalingLaw, str, dict | None]:
    """The law, its name, and 95 % intervals where it was fitted here."""
    if args.fit:
        runs = read_runs(args.fit)
        laws = bootstrap(*runs, repeats=100)
        names = ("A", "B", "E", "alpha", "beta")
        return fit(*runs), f"fit of {len(args.fit)} runs", {
            name: intervals(laws, lambda law, name=name: getattr(law, name)) for name in names
        }  # fmt: skip
    return (LAWS[args.law], args.law, None) if args.law in LAWS else (load_law(args.law), args.law, None)


def measure_text(path: str, tokenizer: str | None, column: str = "text") -> dict:
    """Bytes and tokens of a file, folder or glob; what is not plain text is extrapolated from its beginning.

    Raises:
        UserError: no file, a column that is not there, or a folder without a tokenizer.
    """
    try:
        files = find_files(Source(path)).paths
    except UserError as error:
        raise UserError(f"--data: {error}") from error
    size, sample = 0, b""
    for file in files:
        try:
            beginning, file_size = _measure_file(file, column)
        except (KeyError, ValueError, csv.Error) as error:
            raise UserError(f"--data {file} has no column {column!r}; convert it, or give --tokens") from error
        sample += beginning[: max(SAMPLE - len(sample), 0)]
        size += file_size
    if not size:
        raise UserError(f"--data {path} is no text here; give a file, folder or glob, or --tokens")
    found = {"path": path, "bytes": size, "bytes_per_token": BYTES_PER_TOKEN}
    if tokenizer:
        from tokenizers import Tokenizer

        try:
            encoder = Tokenizer.from_file(str(Path(tokenizer, "tokenizer.json")))
        except Exception as error:  # a plain Exception is all that the library raises
            raise UserError(f"--tokenizer {tokenizer} has no tokenizer.json that can be read; train one") from error
        tokens = len(encoder.encode(sample.decode("utf-8", errors="ignore"), add_special_tokens=False).ids)
        found |= {"bytes_per_token": len(sample) / tokens, "vocab_size": max(encoder.get_vocab().values()) + 1}
    return found | {"tokens": size / found["bytes_per_token"], "measured": bool(tokenizer)}


def _measure_file(file: str, column: str) -> tuple[bytes, int]:
    """The first text of a file, and the bytes of text in all of it, which the beginning suggests.

    Raises:
        KeyError, ValueError, csv.Error, UserError: there is no such column, or the file cannot be read.
    """
    form = file_format(file)
    if form == "json":  # which has to be read as a whole
        texts = [text_of(row, column, file).encode() for row in read_file(file, [column])]
        return b"\n".join(texts), sum(map(len, texts))
    if form == "parquet":
        with open_parquet(file) as parquet:
            batch = next(parquet.iter_batches(batch_size=1000, columns=[column]))
            texts = [str(value).encode() for value in batch.column(column).to_pylist() if value is not None]
            return b"\n".join(texts), sum(map(len, texts)) * parquet.metadata.num_rows // batch.num_rows
    with open_file(file) as handle:
        raw = handle.read(SAMPLE)
        raw += handle.readline()
        size = os.path.getsize(file)
        if file_compression(file):
            size = len(raw)
            while block := handle.read(SAMPLE):
                size += len(block)
    if form == "text":
        return raw, size
    lines = raw.decode("utf-8-sig", errors="ignore").split("\n")
    if form in DELIMITERS:
        rows = csv.DictReader((f"{line}\n" for line in lines), delimiter=DELIMITERS[form])
    else:
        rows = map(json.loads, filter(str.strip, lines))
    text = b"\n".join((row[column] or "").encode() for row in rows)
    return text, round(size * len(text) / max(len(raw), 1))
