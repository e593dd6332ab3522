"""A YAML file and a command line to dataclasses: TRL's `TrlParser`, in which unknown keys are errors.

Every error is a `UserError` of one sentence.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from trl import TrlParser

from unlabeled.config.help_text import format_help
from unlabeled.config.yaml_values import read_yaml_file
from unlabeled.errors import UserError
from unlabeled.runtime.secrets import check_no_secret

# Keys of the previous release and what they are called now.
RENAMED_KEYS = {
    "max_loss_rise": "loss_spike_threshold",
    "max_grad_rise": "grad_norm_skip_ratio",
}
EXPECTED_VALUES = {int: "a whole number", float: "a number", bool: "true or false"}


def parse_arguments(*classes: type, args: list[str] | None = None) -> tuple:
    """Read `--config FILE.yaml` and the command line, which takes precedence, into dataclasses.

    `--KEY null` on the command line restores a default of None that the YAML has changed. `--help` prints the docstring
    of the program and its keys.

    Args:
        classes: Dataclasses without a key in common.
        args: The command line without the name of the program. Default: that of this process.

    Returns:
        An instance of each class.

    Raises:
        UserError: A key is unknown or has an invalid value, the YAML cannot be read, or a value is a secret.
    """
    args = _split_config_option(sys.argv[1:] if args is None else args)
    parser = _ArgumentParser(list(classes), description=sys.modules["__main__"].__doc__ or "", allow_abbrev=False)
    if "-h" in args or "--help" in args:
        parser.parse_args(["--help"])
    _check_options(args, parser)
    args, keys_set_to_null = _remove_null_options(args, parser.dataclass_fields)
    path = args[args.index("--config") + 1] if "--config" in args else None
    _check_no_secret_on_command_line(args)
    if path:
        config = read_yaml_file(path)
        check_no_secret(path, config)
        for key in config:
            if key != "env" and key not in parser.dataclass_fields:
                raise UserError(f"{path}: {_describe_unknown_key(key, parser.dataclass_fields)}")
    parser.keys_set_to_null = keys_set_to_null
    try:
        return parser.parse_args_and_config(args)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error
    except ValueError as error:  # of transformers, over several lines
        message = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: {message}" if path else message) from error


class _ArgumentParser(TrlParser):
    """`TrlParser` that checks the values of the YAML, takes 1e9 for an integer, and raises `UserError`."""

    def __init__(self, classes: list[type], **kwargs: Any) -> None:
        self.actions: list[argparse.Action] = []  # filled by `add_argument`
        self.keys_set_to_null: set[str] = set()
        super().__init__(classes, **kwargs)
        self.classes = classes
        self.dataclass_fields: dict[str, Field] = {
            member.name: member for cls in classes for member in fields(cls) if member.init
        }
        for action in self.actions:
            member = self.dataclass_fields.get(action.dest)
            if member is not None and member.type is int:
                action.type = _accept_exponent(action.type)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.actions.append(action)
        return action

    def format_help(self) -> str:
        return format_help(self.description or "", self.classes)

    def error(self, message: str) -> None:
        """Raise instead of printing the usage, which lists several hundred keys."""
        raise UserError(re.sub(r"^argument --(\w+)\S*:", r"\1:", message) + "; see --help")

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Check the values of the YAML, of which argparse itself would check only the strings."""
        actions: dict[str, argparse.Action] = {}
        for action in self.actions:
            actions.setdefault(action.dest, action)  # --KEY, not the --no_KEY that follows it
        values = {key: _check_value(value, self.dataclass_fields[key], actions[key]) for key, value in config.items()}
        values = {key: value for key, value in values.items() if key not in self.keys_set_to_null}
        return super().set_defaults_with_config(**values)


def _split_config_option(args: list[str]) -> list[str]:
    """Split `--config=FILE`, which TrlParser does not know, into two words."""
    words: list[str] = []
    for arg in args:
        words += arg.split("=", 1) if arg.startswith("--config=") else [arg]
    return words


def _check_options(args: list[str], parser: _ArgumentParser) -> None:
    options = {option for action in parser.actions for option in action.option_strings} | {"--config"}
    if args and not args[0].startswith("-"):
        raise UserError(f"unexpected {args[0]!r}; a YAML file goes after --config")
    for arg in args:
        option = arg.split("=")[0]  # without the value, which may be a secret
        if arg.startswith("--") and option not in options:
            raise UserError(_describe_unknown_option(option, parser.dataclass_fields))
    if args[-1:] == ["--config"]:
        raise UserError("--config needs the path of a YAML file; recipes/configs/ has some")


def _remove_null_options(args: list[str], known: dict[str, Field]) -> tuple[list[str], set[str]]:
    """Take `--KEY null` out of the command line, where None is the default of the key.

    Returns:
        The remaining words, and the names of these keys.
    """
    remaining: list[str] = []
    keys: set[str] = set()
    for arg in args:
        key = remaining[-1][2:] if remaining else ""
        if arg == "null" and key in known and known[key].default is None:
            remaining.pop()
            keys.add(key)
        else:
            remaining.append(arg)
    return remaining, keys


def _check_no_secret_on_command_line(args: list[str]) -> None:
    options = {arg[2:].split("=")[0]: arg for arg in args if arg.startswith("--")}
    check_no_secret("the command line", options)


def _accept_exponent(parse_int: Any) -> Callable[[str], int | None]:
    """Extend the `type` of an argparse action, a function that parses integers, so that it takes 1e9 as well."""

    def parse(text: str) -> int | None:
        has_exponent = re.fullmatch(r"[\d.]+[eE]\+?\d+", text)
        if has_exponent and float(text).is_integer():
            text = f"{float(text):.0f}"
        return parse_int(text)

    parse.__name__ = "int"  # argparse names it: "invalid int value"
    return parse


def _check_value(value: Any, member: Field, action: argparse.Action) -> Any:
    """Convert a value of the YAML to the type of its key. Strings are left to argparse.

    Raises:
        UserError: The value is not of this type, or none of the choices.
    """
    key = member.name
    if value is None and action.default is not None:
        raise UserError(f"{key} has no value; give it one, or remove the key")
    choices = action.choices or ()
    if value is False and "no" in choices:
        value = "no"  # which YAML reads as false
    if value is not None and choices and value not in choices:
        raise UserError(f"{key}: {value!r} is none of {', '.join(map(str, choices))}")
    if value is None or isinstance(value, str):
        return value
    if member.type in EXPECTED_VALUES and not _is_of_type(value, member.type):
        raise UserError(f"{key} takes {EXPECTED_VALUES[member.type]}, not {value!r}")
    if _is_number(value) and member.type in (int, str):
        return member.type(value)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_of_type(value: Any, expected: type) -> bool:
    if expected is bool:
        return isinstance(value, bool)
    if expected is int:
        return _is_number(value) and float(value).is_integer()
    return _is_number(value)


def _describe_unknown_option(option: str, known: dict[str, Field]) -> str:
    key = option[2:]
    if key in RENAMED_KEYS:
        return f"{option} is called --{RENAMED_KEYS[key]} now; rename it"
    return f"unknown option {option}; did you mean --{_nearest_key(key, known)}?"


def _describe_unknown_key(key: object, known: dict[str, Field]) -> str:
    if key in RENAMED_KEYS:
        return f"{key} is called {RENAMED_KEYS[key]} now; rename it"
    return f"unknown key {key!r}; did you mean {_nearest_key(str(key), known)!r}?"


def _nearest_key(key: str, known: dict[str, Field]) -> str:
    return get_close_matches(key, known, 1, 0)[0]
