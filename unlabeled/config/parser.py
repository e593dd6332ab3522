"""A YAML and a command line to dataclasses: `TrlParser`, with unknown keys fatal and every complaint one sentence."""

import re
import sys
from dataclasses import fields
from difflib import get_close_matches

import yaml
from trl import TrlParser

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_small_file
from unlabeled.runtime.secrets import check_no_secret, yaml_problem

# Keys of the previous release and what they are called now.
RENAMED_KEYS = {
    "max_loss_rise": "loss_spike_threshold",
    "max_grad_rise": "grad_norm_skip_ratio",
}


class _Parser(TrlParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kinds = {f.name: f.type for cls in self.dataclass_types for f in fields(cls) if f.init}
        for action in self._actions:
            if self.kinds.get(action.dest) is int:
                action.type = _with_exponent(action.type)
        self.unset: set[str] = set()

    def error(self, message):  # argparse prints its whole usage otherwise
        raise UserError(re.sub(r"^argument --(\w+)\S*:", r"\1:", message) + "; see --help")

    def set_defaults_with_config(self, **config):
        """Values of a YAML, which argparse converts and checks only where they are strings."""
        actions = {action.dest: action for action in reversed(self._actions)}  # reversed: --no_KEY comes after --KEY
        checked = {key: _checked(key, value, self.kinds[key], actions[key]) for key, value in config.items()}
        checked = {key: value for key, value in checked.items() if key not in self.unset}
        return super().set_defaults_with_config(**checked)


def _with_exponent(parse_int):
    """`parse_int`, which also takes 1e9."""

    def parse_whole(text: str) -> int | None:
        exponent = re.fullmatch(r"[\d.]+[eE]\+?\d+", text) and float(text).is_integer()
        return parse_int(f"{float(text):.0f}" if exponent else text)

    parse_whole.__name__ = "int"  # argparse complains of an "invalid int value"
    return parse_whole


def _checked(key: str, value, kind: type, action):
    """A value of a YAML as what its key takes, or a UserError; strings are left to argparse."""
    if value is None and action.default is not None:
        raise UserError(f"{key} has no value; give it one, or remove the key")
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML takes for false
    if value is not None and action.choices and value not in action.choices:
        raise UserError(f"{key}: {value!r} is none of {', '.join(map(str, action.choices))}")
    if value is None or isinstance(value, str):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    takes = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind)
    fits = {int: number and float(value).is_integer(), float: number, bool: isinstance(value, bool)} if takes else {}
    if takes and not fits[kind]:
        raise UserError(f"{key} takes {takes}, not {value!r}")
    return kind(value) if number and kind in (int, str) else value


def parse(*classes: type, args: list[str] | None = None) -> tuple:
    """Read `--config FILE.yaml` and the command line, which wins, into an instance of each class, or a UserError."""
    args = [word for arg in (sys.argv[1:] if args is None else args)
            for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]  # fmt: skip
    parser = _Parser(list(classes), allow_abbrev=False)
    known = {name: member for cls in classes for name, member in cls.__dataclass_fields__.items() if member.init}
    options = {option for action in parser._actions for option in action.option_strings} | {"--config"}
    if args and not args[0].startswith("-"):
        raise UserError(f"unexpected {args[0]!r}; a YAML file goes after --config")
    for arg in args:
        option = arg.split("=")[0]  # the value may be a secret
        if arg.startswith("--") and option not in options:
            raise UserError(_unknown_option(option, known))
    if args[-1:] == ["--config"]:
        raise UserError("--config needs the path of a YAML file; recipes/configs/ has some")
    path = args[args.index("--config") + 1] if "--config" in args else None
    for i in reversed(range(len(args) - 1)):  # `--KEY null` takes back what the YAML says
        if args[i + 1 : i + 2] == ["null"] and (member := known.get(args[i][2:])) and member.default is None:
            parser.unset.add(member.name)
            del args[i : i + 2]
    check_no_secret("the command line", {arg[2:].split("=")[0]: arg for arg in args if arg.startswith("--")})
    config = _read_yaml(path) if path else {}
    check_no_secret(str(path), config)
    for key in config:
        if key != "env" and key not in known:
            raise UserError(f"{path}: {_unknown_key(key, known)}")
    try:
        return parser.parse_args_and_config(args)
    except (UserError, ValueError) as error:  # transformers raises ValueError, over several lines
        message = str(error) if isinstance(error, UserError) else str(error).strip().splitlines()[0]
        raise UserError(f"{path}: {message}" if path else message) from error


def _unknown_option(option: str, known: dict) -> str:
    key = option[2:]
    if key in RENAMED_KEYS:
        return f"{option} is called --{RENAMED_KEYS[key]} now; rename it"
    return f"unknown option {option}; did you mean --{_nearest(key, known)}?"


def _unknown_key(key: object, known: dict) -> str:
    if key in RENAMED_KEYS:
        return f"{key} is called {RENAMED_KEYS[key]} now; rename it"
    return f"unknown key {key!r}; did you mean {_nearest(str(key), known)!r}?"


def _read_yaml(path: str) -> dict:
    try:
        config = yaml_value(path, read_small_file(path))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}; recipes/configs/ has examples") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no keys; see recipes/configs/ for examples")
    return config


def yaml_value(where: str, text: str):
    """The value of `text`, or a UserError that begins with `where`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML; correct it: {yaml_problem(error)}") from error
    except (ValueError, RecursionError) as error:  # dates that cannot be, and deep nesting
        raise UserError(f"{where} is not valid YAML; correct it: {' '.join(str(error).split())}") from error


def _nearest(key: str, known) -> str:
    return get_close_matches(key, known, 1, 0)[0]
