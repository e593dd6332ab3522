"""A known answer for each objective: on a Markov source the best possible loss has a closed form.

Below it by more than the sampling error: a leak. Well above: something is broken. K = 16 states; with probability .8
the next state follows, otherwise any of the 16 with equal probability. Masked: every target becomes the mask token.
"""

import json
import math

import numpy as np
import pytest
from conftest import recipe_arguments, run_recipe

K, STAY = 16, 0.8
FLOORS = {("clm", None): 0.9903, ("mlm", 0.15): 0.4928, ("mlm", 0.30): 0.5831, ("mlm", 0.50): 0.7712}


def chain(tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    step = np.where(rng.random(tokens) < STAY, 1, rng.integers(K, size=tokens))
    return (rng.integers(K) + np.cumsum(step)) % K


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def floor(objective: str, probability: float | None) -> float:
    """The entropy of a state given what is visible: the state before, or the nearest unmasked state to either side."""
    transition = STAY * np.roll(np.eye(K), 1, axis=1) + (1 - STAY) / K
    if objective == "clm":
        return entropy(transition[0])
    powers = [np.linalg.matrix_power(transition, distance) for distance in range(40)]
    total = 0.0
    for left in range(1, 40):
        for right in range(1, 40):
            weight = (1 - probability) ** 2 * probability ** (left + right - 2)
            if weight > 1e-9:
                joint = (
                    powers[left][0][:, None] * powers[right]
                )  # (state, state to the right), the one to the left is 0
                total += weight * (entropy(joint.ravel()) - entropy(joint.sum(0)))
    return total


@pytest.mark.parametrize(("objective", "probability"), list(FLOORS))
def test_entropy_floors(objective, probability):
    assert floor(objective, probability) == pytest.approx(FLOORS[objective, probability], abs=1e-4)
    follows = (np.diff(chain(400_000, 0)) % K == 1).mean()
    assert follows == pytest.approx(STAY + (1 - STAY) / K, abs=0.003)


@pytest.fixture(scope="module")
def markov(tmp_path_factory):
    """Corpus of long documents of the source, and a word-level tokenizer for its states."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("markov")
    names = [chr(ord("a") + state) for state in range(K)]
    paths = {}
    for split, documents, seed in (("train", 400, 0), ("validation", 150, 10_000)):
        lines = [" ".join(names[s] for s in chain(1000, seed + i)) for i in range(documents)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        paths[split] = str(folder / f"{split}.jsonl")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>",
               "cls_token": "<cls>", "sep_token": "<sep>", "unk_token": "<unk>"}  # fmt: skip
    vocabulary = {name: i for i, name in enumerate([*special.values(), *names])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "tokenizer")
    return paths, {"clm": str(folder / "tokenizer"), "mlm": str(folder / "tokenizer")}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "probability"), list(FLOORS))
def test_held_out_loss_reaches_entropy_floor(objective, probability, markov, tmp_path):
    paths, tokenizers = markov
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {
        # Long rows: at the two ends of a piece a state has one neighbour less, and costs more than the closed form.
        "max_length": 256, "batch_tokens": 2048, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32,
        "train_tokens": 2048 * 500, "optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.0,
        "warmup_steps": 0.05, "logging_steps": 100,
    }  # fmt: skip
    if objective == "clm":
        model_type = "llama"
    else:  # fewer targets in a step; and narrow windows, since attention has to find the neighbours first
        model_type = "modernbert"
        sizes |= {"local_attention": 8, "layer_types": ["sliding_attention"] * 2}
        options |= {"mlm_probability": probability, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}
        options["train_tokens"] = 2048 * 1200
    options["config_overrides"] = json.dumps(sizes)
    run_recipe(f"pretrain_{objective}", recipe_arguments(objective, model_type, paths, tokenizers, tmp_path, **options))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected, targets = FLOORS[objective, probability], metrics["targets"]
    at_training_rate = objective == "mlm" and probability != 0.15
    loss = metrics["eval_loss_at_training_rate" if at_training_rate else "eval_loss"]
    if at_training_rate:
        targets *= probability / 0.15
    # A target costs between -ln .81 = .21 and -ln .0125 = 4.4 nats: mostly the one or the other, deviation below 1.7.
    error = 3 * 1.7 / math.sqrt(targets)
    print(f"{objective} {probability}: loss {loss:.4f}, floor {expected:.4f}, three standard errors {error:.4f}")
    assert expected - error < loss < expected + 0.05
