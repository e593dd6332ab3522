"""Secrets: refused by their names in a configuration, and found by their form in files that are to be pushed."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from unlabeled.errors import UserError

# --- In a configuration: YAML files are shared, and command lines appear in logs and in the list of processes ---------

SECRET_NAME = re.compile(r"(^|_)(token|api_?key|access_?key|secret|password)$", re.IGNORECASE)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def check_no_secret(source: str, keys: Mapping[str, object]) -> None:
    """Raise `UserError`, without the value, if a key or a variable in its `env` has the name of a secret.

    Args:
        source: The name of the configuration, for the message.
        keys: The keys of the configuration.
    """
    items = list(keys.items())
    environment = keys.get("env")
    if isinstance(environment, Mapping):
        items += environment.items()
    for key, value in items:
        if value is not None and key not in SPECIAL_TOKENS and SECRET_NAME.search(str(key)):
            raise UserError(
                f"{source}: remove {key}: secrets of a YAML or a command line end up in logs and in the list of "
                "processes; set it in the environment, for the Hub HF_TOKEN, or run `hf auth login`"
            )


def yaml_problem(error: yaml.YAMLError) -> str:
    """Describe an error in a YAML by its line and column, without the line itself, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:  # of bytes that are not text
        return getattr(error, "reason", type(error).__name__)
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


# --- In files: the detectors of detect-secrets, which know the form of each provider's keys ---------------------------

# Hashes and base64 have a high entropy, words of a vocabulary begin like keys of Artifactory, version numbers look like
# addresses, and the keys of IBM's services have names that KeywordDetector finds.
UNUSED_DETECTORS = (
    "Base64HighEntropyString", "HexHighEntropyString", "ArtifactoryDetector", "IPPublicDetector", "CloudantDetector",
    "IbmCloudIamDetector", "IbmCosHmacDetector", "SoftlayerDetector",
)  # fmt: skip
HUB_TOKEN = "hf_[A-Za-z0-9]{34}"
# Secrets that detect-secrets 1.5.0 does not detect, from the providers' documentation.
OTHER_SECRETS = {
    "Hugging Face Token": rf"\b{HUB_TOKEN}\b",
    "Google API Key": r"\bAIza[A-Za-z0-9_-]{35}",
    "Google OAuth Secret": r"\bGOCSPX-[A-Za-z0-9_-]{28}",
    "GitHub Token": r"\bgithub_pat_[A-Za-z0-9_]{82}\b",
    "OpenAI Token": r"\bsk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20,}",
    "Anthropic Key": r"\bsk-ant-[a-z]+\d\d-[A-Za-z0-9_-]{80,}",
    "NPM Token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "Slack App Token": r"\bxapp-\d-[A-Z0-9]+-\d+-[a-f0-9]+",
}
BLOCK_BYTES = 1 << 16


def find_secret(path: str | Path) -> tuple[int, str] | None:
    """Find the first secret in a text file. Bytes that are not UTF-8 are skipped.

    Returns:
        Its line number, from 1, and its kind; or None.
    """
    first_line = 1
    with open(path, encoding="utf-8", errors="ignore") as handle:
        while lines := handle.readlines(BLOCK_BYTES):
            # Whole blocks first, as a vocabulary has a hundred thousand lines.
            if any(True for _ in _find_candidates("".join(lines))):
                for number, line in enumerate(lines, first_line):
                    for kind, value in _find_candidates(line):
                        if kind != "Secret Keyword" or _is_plausible_password(value):
                            return number, kind
            first_line += len(lines)
    return None


def _find_candidates(text: str) -> Iterator[tuple[str, str]]:
    """Yield kind and value of everything in a text that looks like a secret."""
    text = text.replace('\\"', '"')  # quotes inside JSON
    for detector, keyword in _detectors():
        if keyword is None or keyword.search(text):
            for value in detector.analyze_string(text):
                yield detector.secret_type, value


@lru_cache(maxsize=1)
def _detectors() -> list[tuple[Any, re.Pattern | None]]:
    """The detectors, each with a pattern that a text has to match for the detector to be worth its time, or None."""
    # Imported only for a push. The detectors are called directly, as a scan of detect-secrets may ask the providers.
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.keyword import DENYLIST

    def make_detector(kind: str, pattern: str) -> RegexBasedDetector:
        members = {"secret_type": kind, "denylist": [re.compile(pattern)]}
        detector_class: Any = type("OtherDetector", (RegexBasedDetector,), members)
        return detector_class()

    # These two take ten times as long as all others together.
    keywords = {
        "KeywordDetector": re.compile("|".join(DENYLIST), re.IGNORECASE),
        "NpmDetector": re.compile("_authToken"),
    }
    detectors = []
    for detector in get_mapping_from_secret_type_to_class().values():
        if detector.__name__ not in UNUSED_DETECTORS:
            detectors.append((detector(), keywords.get(detector.__name__)))
    for kind, pattern in OTHER_SECRETS.items():
        detectors.append((make_detector(kind, pattern), None))
    return detectors


def _is_plausible_password(value: str) -> bool:
    """Whether the value of `password:` or the like is a password, rather than prose or a placeholder."""
    from detect_secrets.filters.heuristic import is_not_alphanumeric_string, is_templated_secret

    is_prose = len(value) < 6 or any(character.isspace() for character in value)
    return not (is_prose or is_templated_secret(value) or is_not_alphanumeric_string(value))
