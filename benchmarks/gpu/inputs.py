"""Random text, tokenizers, and a model to fine-tune."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.documents import document_lengths
from unlabeled.data.tokenizer_training import train_tokenizer

LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
UNIGRAM_VOCABULARY_SIZE = 600  # a larger one takes long to train


class RandomText:
    """Draws random words of random letters, with frequencies that fall like those of a language."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        frequencies = 1 / np.arange(3, 3 + len(LETTERS))
        frequencies /= frequencies.sum()
        letters = np.array(list(LETTERS))
        words = {"".join(rng.choice(letters, rng.integers(2, 9), p=frequencies)) for _ in range(3_000)}
        self.words = np.array(sorted(words))
        self.frequencies = 1 / np.arange(10, 10 + len(words))
        self.frequencies /= self.frequencies.sum()

    def draw(self, words: int) -> str:
        return " ".join(self.rng.choice(self.words, max(words, 1), p=self.frequencies))


def make_inputs(folder: Path, small: bool) -> None:
    """Write text, conversations, preferences and tokenizers, unless they exist."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    random_text = RandomText(rng)
    lengths = document_lengths(rng, 60 if small else 3_000)  # in tokens; a word has about 1.4
    if small:
        lengths = lengths // 8 + 4
    texts = [random_text.draw(length * 3 // 4) for length in lengths]
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts])
    write_jsonl(folder / "validation.jsonl", [{"text": text} for text in texts[: len(texts) // 30 + 2]])
    conversations = []
    preferences = []
    for length in document_lengths(rng, 40 if small else 1_500) // 8 + 2:
        prompt = random_text.draw(int(length) // 3)
        chosen = random_text.draw(int(length))
        rejected = random_text.draw(int(length))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": chosen}]
        conversations.append({"messages": messages})
        preferences.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(folder / "conversations.jsonl", conversations)
    write_jsonl(folder / "preferences.jsonl", preferences)
    vocabulary_size = 600 if small else 4096
    for algorithm in ("bpe", "wordpiece", "unigram"):
        size = min(vocabulary_size, UNIGRAM_VOCABULARY_SIZE) if algorithm == "unigram" else vocabulary_size
        train_tokenizer(texts[:300], algorithm, size).save_pretrained(folder / algorithm)
    (folder / "complete").touch()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def make_base_model(folder: Path, small: bool) -> None:
    """Save a Llama of the size of SmolLM2-135M with random weights as `base`, unless it exists."""
    if (folder / "base" / "config.json").exists():
        return
    if small:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 640,
        }
    else:
        sizes = {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 2048,
        }
    special_tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **sizes, **special_tokens, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(folder / "bpe", trust_remote_code=False).save_pretrained(folder / "base")
