"""Sources of documents or rows, as a YAML key such as `train_data` names them."""

from dataclasses import dataclass, fields
from difflib import get_close_matches

from unlabeled.errors import UserError


@dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
        path: a file, a folder, a glob, or the name of a data set on the Hub. A .txt or .md file is one document; in the
            other formats each row is one. A path that exists is taken literally, even if it contains brackets or stars.
        weight: relative share of the tokens among several sources.
        text_column: the column that holds the text.
        name, split, revision, streaming: for the Hub, as in `datasets.load_dataset`. `streaming` reads without
            downloading the whole data set first.
    """

    path: str
    weight: float = 1.0
    text_column: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self):
        for member in fields(self):
            value = getattr(self, member.name)
            if not isinstance(value, int | float if member.type is float else member.type):
                raise UserError(f"{member.name} of the source {self.path!r} is {value!r}; correct it")
        if not self.weight > 0:
            raise UserError(f"the weight of {self.path} is {self.weight}; give each source a positive weight")


def parse_sources(value: str | dict | list, key: str, text_column: str = "text") -> list[Source]:
    """The sources that a YAML key names.

    Args:
        value: a path, a mapping with `path` and other fields of `Source`, or a list of these.
        key: the key, for messages.
        text_column: the default of `Source.text_column`.

    Raises:
        UserError: a field is unknown or missing.
    """
    known = [member.name for member in fields(Source)]
    sources = []
    for item in value if isinstance(value, list) else [value]:
        item = {"path": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or "path" not in item:
            raise UserError(f"{key}: {item!r} is neither a path nor a mapping with a path")
        for name in item:
            if name not in known:
                nearest = get_close_matches(name, known, 1, 0) or known
                raise UserError(f"{key}: a source has no field {name!r}; did you mean {nearest[0]!r}?")
        try:
            sources.append(Source(**{"text_column": text_column, **item}))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return sources
