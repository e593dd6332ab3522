"""Values written in YAML: in a file, or on the command line where a key takes a list or a mapping."""

from typing import Any

import yaml

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_small_file
from unlabeled.runtime.secrets import yaml_problem


def parse_yaml(name: str, text: str) -> Any:
    """Parse YAML.

    Args:
        name: The file or key that the text belongs to. Error messages begin with it.
        text: The YAML.

    Raises:
        UserError: The text is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML; correct it: {yaml_problem(error)}") from error
    except (ValueError, RecursionError) as error:  # impossible dates, and deep nesting
        raise UserError(f"{name} is not valid YAML; correct it: {' '.join(str(error).split())}") from error


def read_yaml_file(path: str) -> dict:
    """Read the YAML file of `--config`.

    Raises:
        UserError: The file cannot be read, is not UTF-8, is not valid YAML, or is not a mapping.
    """
    try:
        config = parse_yaml(path, read_small_file(path))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}; recipes/configs/ has examples") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no keys; see recipes/configs/ for examples")
    return config


def is_yaml_collection(value: object) -> bool:
    """Whether a value from the command line is a list or a mapping written in YAML or JSON."""
    return isinstance(value, str) and value[:1] in ("[", "{")
