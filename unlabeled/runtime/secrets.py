"""Secrets: refused by their names in a configuration, and found by their form in files that would leave the machine."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import yaml

from unlabeled.errors import UserError

# --- In a configuration: a YAML is shared, a command line is in logs and in the list of processes ---------------------

SECRET_NAME = re.compile(r"(^|_)(token|api_?key|access_?key|secret|password)$", re.IGNORECASE)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def check_no_secret(where: str, keys: Mapping) -> None:
    """Raise `UserError`, without the value, if one of `keys`, or a variable of the `env` among them, names a secret."""
    variables = keys.get("env")
    for key, value in [*keys.items(), *(variables.items() if isinstance(variables, Mapping) else ())]:
        if value is not None and key not in SPECIAL_TOKENS and SECRET_NAME.search(str(key)):
            raise UserError(
                f"{where}: remove {key}: secrets of a YAML or a command line end up in logs and in the list of "
                "processes; set it in the environment, for the Hub HF_TOKEN, or run `hf auth login`"
            )


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML and where, without the line itself, which may hold a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:  # of bytes that are no text
        return getattr(error, "reason", type(error).__name__)
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


# --- In files: the detectors of detect-secrets, which know the form of each provider's keys ---------------------------

# Hashes and base64 have a high entropy, words of a vocabulary begin like keys of Artifactory, numbers of versions look
# like addresses; and what the detectors of IBM's services find has a name that KeywordDetector knows.
UNUSED_DETECTORS = (
    "Base64HighEntropyString", "HexHighEntropyString", "ArtifactoryDetector", "IPPublicDetector", "CloudantDetector",
    "IbmCloudIamDetector", "IbmCosHmacDetector", "SoftlayerDetector",
)  # fmt: skip
HUB_TOKEN = "hf_[A-Za-z0-9]{34}"
# What detect-secrets 1.5.0 does not know, from the providers' documentation.
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
    """The line number of the first secret in a text file and its kind, or None. Bytes that are no UTF-8 are skipped."""
    number = 0
    with open(path, encoding="utf-8", errors="ignore") as handle:
        while lines := handle.readlines(BLOCK_BYTES):
            # Whole blocks first: a vocabulary has a hundred thousand lines.
            if any(True for _ in _secrets("".join(lines))):
                for offset, line in enumerate(lines, 1):
                    for kind, value in _secrets(line):
                        if kind != "Secret Keyword" or _is_plausible_password(value):
                            return number + offset, kind
            number += len(lines)
    return None


def _secrets(text: str) -> Iterator[tuple[str, str]]:
    """Kind and value of everything in a text that looks like a secret."""
    text = text.replace('\\"', '"')  # quotes inside JSON
    for detector, cue in _detectors():
        if cue is None or cue.search(text):
            for value in detector.analyze_string(text):
                yield detector.secret_type, value


@lru_cache(maxsize=1)
def _detectors() -> list[tuple]:
    """The detectors, each with what a text has to hold for it to be worth the time, or None."""
    # Imported for a push only. The detectors are used by themselves: a scan of detect-secrets may ask the providers.
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.keyword import DENYLIST

    def detector_of(kind: str, pattern: str) -> RegexBasedDetector:
        members = {"secret_type": kind, "denylist": [re.compile(pattern)]}
        return type("OtherDetector", (RegexBasedDetector,), members)()

    # These two take ten times as long as all others together.
    cues = {"KeywordDetector": re.compile("|".join(DENYLIST), re.IGNORECASE), "NpmDetector": re.compile("_authToken")}
    known = get_mapping_from_secret_type_to_class().values()
    found = [(cls(), cues.get(cls.__name__)) for cls in known if cls.__name__ not in UNUSED_DETECTORS]
    return found + [(detector_of(kind, pattern), None) for kind, pattern in OTHER_SECRETS.items()]


def _is_plausible_password(value: str) -> bool:
    """Whether what follows `password:` or the like is one, rather than prose or a placeholder."""
    from detect_secrets.filters.heuristic import is_not_alphanumeric_string, is_templated_secret

    prose = len(value) < 6 or any(character.isspace() for character in value)
    return not (prose or is_templated_secret(value) or is_not_alphanumeric_string(value))
