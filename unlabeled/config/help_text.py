"""The text that a recipe prints for `--help`."""

from dataclasses import MISSING, Field, fields
from inspect import get_annotations
from types import UnionType
from typing import Any, Union, get_args, get_origin

LIBRARIES = ("transformers", "trl", "sentence_transformers")
SIMPLE_TYPES = (int, float, bool, dict)


def format_help(description: str, classes: list[type]) -> str:
    """Describe a recipe and its keys.

    Keys that a class inherits from a library are not listed; one line names the class of the library that has them.

    Args:
        description: The docstring of the recipe.
        classes: The dataclasses that the recipe parses.
    """
    lines = [description.strip(), ""]
    for cls in classes:
        lines.append(_first_sentence(cls))
        lines.append("")
        lines += [_format_field(member) for member in _own_fields(cls)]
        library_class = _library_class(cls)
        if library_class is not None:
            package = library_class.__module__.split(".")[0]
            lines.append(f"  and every key of {package}.{library_class.__name__}")
        lines.append("")
    lines.append("All of them may stand in the YAML of --config as well; the command line wins.")
    return "\n".join(lines) + "\n"


def _first_sentence(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


def _is_from_library(cls: type) -> bool:
    return cls.__module__.split(".")[0] in LIBRARIES


def _library_class(cls: type) -> type | None:
    """The class of a library that a class of arguments extends."""
    for base in cls.__mro__:
        if _is_from_library(base):
            return base
    return None


def _own_fields(cls: type) -> list[Field]:
    """The fields that a class and its bases define, other than those of libraries and those that keep their default."""
    members = {member.name: member for member in fields(cls) if member.init}
    for name in getattr(cls, "refused", ()):
        members.pop(name, None)
    own: dict[str, Field] = {}
    for base in reversed(cls.__mro__):
        if not _is_from_library(base):
            own |= {name: members[name] for name in get_annotations(base) if name in members}
    return list(own.values())


def _format_field(member: Field) -> str:
    default = None if member.default is MISSING else member.default
    help_text = member.metadata.get("help", "")
    return f"  --{member.name:<26} {_type_name(member.type):<5} {help_text} ({_yaml_scalar(default)})"


def _type_name(annotation: Any) -> str:
    """int, float, bool, dict, or str for anything else that is written as text."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = get_args(annotation)[0]
    return annotation.__name__ if annotation in SIMPLE_TYPES else "str"


def _yaml_scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
