"""Secrets: refused in every configuration without being printed, found in files that would leave the machine."""

import base64
import hashlib
import json
import random
import string

import pytest
import yaml
from conftest import ROOT

from unlabeled import UserError
from unlabeled.chain.plan import Chain
from unlabeled.config import DataArguments, ModelArguments, PretrainingArguments, parse_arguments
from unlabeled.planner.recipe_config import read_recipe_config
from unlabeled.runtime.secrets import find_secret

TOKEN = "hf_" + "PlantedTokenThatNobodyMaySee012345"
REMEDY = "set it in the environment, for the Hub HF_TOKEN, or run `hf auth login`"


def draw(letters: str, length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


ALPHANUMERIC = string.ascii_letters + string.digits
HEADER = base64.urlsafe_b64encode(b'{"alg":"HS256"}').decode().rstrip("=")
CLAIMS = base64.urlsafe_b64encode(b'{"sub":"1234567890"}').decode().rstrip("=")
# Drawn here, in two parts: no scanner of repositories takes this file for one that holds keys.
KEYS = {
    "AWS": "AK" + "IA" + draw(string.ascii_uppercase + string.digits, 16),
    "GitHub": "gh" + "p_" + draw(ALPHANUMERIC, 36),
    "GitHub, fine-grained": "github" + "_pat_" + draw(ALPHANUMERIC, 82),
    "GitLab": "gl" + "pat-" + draw(ALPHANUMERIC, 20),
    "Slack": "xo" + "xb-" + f"{draw(string.digits, 12)}-{draw(string.digits, 12)}-{draw(ALPHANUMERIC, 24)}",
    "Stripe": "sk" + "_live_" + draw(ALPHANUMERIC, 24),
    "OpenAI": "sk" + "-proj-" + draw(ALPHANUMERIC + "-_", 60) + "T3Blbk" + "FJ" + draw(ALPHANUMERIC + "-_", 60),
    "Anthropic": "sk" + "-ant-api03-" + draw(ALPHANUMERIC + "-_", 95),
    "Google": "AI" + "za" + draw(ALPHANUMERIC, 35),
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "JSON web token": f"{HEADER}.{CLAIMS}.{draw(ALPHANUMERIC, 43)}",
    "Hugging Face": "h" + "f_" + draw(ALPHANUMERIC, 34),
    "SendGrid": "SG" + f".{draw(ALPHANUMERIC, 22)}.{draw(ALPHANUMERIC, 43)}",
    "Twilio": "SK" + draw(string.hexdigits.lower()[:16], 32),
    "npm": "np" + "m_" + draw(ALPHANUMERIC, 36),
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmc" + draw(ALPHANUMERIC, 80),
    "password": 'password = "' + draw(ALPHANUMERIC, 12) + '"',
    "address with a password": "postgres://" + "reader:" + draw(ALPHANUMERIC, 12) + "@host/texts",
}


# --- In a configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"hub_token: {TOKEN}\n", []),
        (f"push_to_hub_token: {TOKEN}\n", []),
        (f"env: {{HF_TOKEN: {TOKEN}}}\n", []),
        (f"env: {{WANDB_API_KEY: {TOKEN}}}\n", []),
        ("", ["--hub_token", TOKEN]),
        ("", [f"--hub_token={TOKEN}"]),
        ("", [f"--hub_tokn={TOKEN}"]),
        (f"hub_token: '{TOKEN}\n", []),
        (f"seed: [0\nhub_token: {TOKEN}\n", []),
    ],
)
def test_secret_in_a_yaml_or_on_a_command_line(text, words, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n" + text)
    with pytest.raises(UserError) as error:
        parse_arguments(ModelArguments, DataArguments, PretrainingArguments, args=["--config", str(path), *words])
    sentence = str(error.value)
    assert TOKEN not in sentence and "\n" not in sentence
    assert REMEDY in sentence or "did you mean --hub_token?" in sentence or "is not valid YAML" in sentence


def test_harmless_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("hub_token: null\neos_token: <end>\n")
    with pytest.raises(UserError, match="unknown key 'eos_token'"):  # of pretraining; SFT has it
        parse_arguments(
            ModelArguments, DataArguments, PretrainingArguments, args=["--config", str(path), "--hub_token", "null"]
        )


@pytest.mark.parametrize(
    "stage",
    [
        {"pretrain_clm": {"hub_token": TOKEN}},
        {"dpo": {"config": "with_token.yaml"}},
        {"sft": {"config": "broken.yaml"}},
        {"classify": {"env": {"HF_TOKEN": TOKEN}}},
        {"tag": {"env": {"HUB_CREDENTIALS": TOKEN}}},
        {"push": {"repo_id": "me/it", "token": TOKEN}},
    ],
)
def test_secret_in_a_chain(stage, tmp_path, monkeypatch):
    """It is refused before anything is run or written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "with_token.yaml").write_text(f"hub_token: {TOKEN}\n")
    (tmp_path / "broken.yaml").write_text(f"hub_token: '{TOKEN}\n")
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"output_dir": "out", "stages": [stage]}))
    with pytest.raises(UserError) as error:
        Chain("test.yaml")
    assert TOKEN not in str(error.value)
    assert REMEDY in str(error.value) or "not valid YAML" in str(error.value) or "move env to" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_broken_yaml_of_a_plan(tmp_path):
    """The line that is wrong is named and not shown."""
    (tmp_path / "broken.yaml").write_text(f"seed: 1\nhub_token: '{TOKEN}\n")
    with pytest.raises(UserError, match=r"broken\.yaml cannot be read: .* in line 3") as error:
        read_recipe_config(str(tmp_path / "broken.yaml"))
    assert TOKEN not in str(error.value)


# --- In files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", KEYS)
def test_provider_key(provider, tmp_path):
    """As a line of text, in JSON, and inside of one long line."""
    key, path = KEYS[provider], tmp_path / "file"
    for number, text in (
        (2, f"some text\n{key}\nmore"),
        (3, json.dumps({"text": "before", "samples": f"he said: {key}, and left"}, indent=1)),
        (1, json.dumps([f"word{i}" for i in range(30_000)] + [key])),
        (20_001, "word\n" * 20_000 + key),
    ):
        path.write_text(text)
        line, kind = find_secret(path)
        assert line == number, provider
        assert key not in kind


def test_harmless_text(tmp_path):
    numbers = random.Random(0)
    digest = hashlib.sha256(b"text").hexdigest()
    bytes_as_text = base64.b64encode(numbers.randbytes(3000)).decode()
    harmless = [
        json.dumps({"weights": {"model.safetensors": digest}, "commit": digest[:40]}, indent=1),
        json.dumps({"password": 17, "Ġsecret": 4, "api_key": 5, "token": 6, "APOSTROPHES": 7}, indent=1),
        json.dumps({"eos_token": "<|im_end|>", "pad_token": "<pad>", "secret": "<secret>"}),
        'her secret: "that she had never read it", and the password: "in a low voice"',
        bytes_as_text,
        "\n".join(bytes_as_text[at : at + 76] for at in range(0, 3000, 76)),
        "1.2.3.4, 550e8400-e29b-41d4-a716-446655440000, hf_not_one, sk-learn, https://host:80/path@v1",
    ]
    for text in harmless:
        (tmp_path / "file").write_text(text)
        assert find_secret(tmp_path / "file") is None, text[:80]
