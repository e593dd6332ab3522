"""`transformers serve` answers from a folder with a chat template, with the command of the README."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import MODELS, ROOT, free_ports
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from unlabeled.data.chat_templates import set_chat_template, stop_at_end_of_turn
from unlabeled.models.configs import scratch_config
from unlabeled.models.generation import reply
from unlabeled.models.loading import init_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs `pip install 'transformers[serving]==5.23.0'`"),
]


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def folder(tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(tokenizer, str(ROOT / "recipes/templates/chatml.jinja"))
    torch.manual_seed(0)
    config = scratch_config("llama", MODELS["llama"] | {"initializer_range": 0.3}, tokenizer, 64)
    model = init_model(AutoModelForCausalLM, config, "sdpa")
    stop_at_end_of_turn(model, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def server(folder):
    """The address of a server of that folder, which is killed with all that it started."""
    (port,) = free_ports(1)
    # The same as `transformers serve FOLDER --device cpu`, of this interpreter.
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    log = folder.parent / "log"
    with log.open("w") as handle:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=handle, stderr=handle, start_new_session=True, env={**os.environ}
        )
    try:
        end = time.time() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.time() < end, log.read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_serve_equals_generate(folder, server):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "the people"}]
    body = {"model": str(folder), "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = post(f"{server}/v1/chat/completions", body)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": reply(model, tokenizer, messages, 8)}
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(asked)
    more = post(f"{server}/v1/completions", {"model": str(folder), "prompt": "the people", "max_tokens": 8})
    assert more["choices"][0]["text"]
