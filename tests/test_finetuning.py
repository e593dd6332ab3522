"""Fine-tuning and preference tuning: what is learned, what is left behind, and that stages and adapters add up."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from batch_log import assert_same_order, recorded_command
from conftest import ROOT, WORDS, history, recipe_arguments, run_recipe, weights
from peft import LoraConfig
from safetensors.torch import load_file
from test_equality import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlabeled import UserError
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.preferences import prepare_pairs
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.rows import training_order
from unlabeled.data.sources import Source
from unlabeled.models.adapters import apply_lora_config, new_token_rows
from unlabeled.models.exports import load_and_check_export
from unlabeled.models.losses import cross_entropy_sum
from unlabeled.models.vocabulary import fit_to_tokenizer
from unlabeled.reporting.lineage import weights_sha256

CHATML = str(ROOT / "recipes" / "templates" / "chatml.jinja")
LENGTH, ROWS, STEPS = 64, 8, 4
BETA = 0.1
GENERATE = transformers.GenerationMixin.generate
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8}


# --- Data and runs ---------------------------------------------------------------------------------------------------


def phrase(draw: random.Random, words: int) -> str:
    at = draw.randrange(len(WORDS))
    return " ".join(WORDS[(at + i) % len(WORDS)] for i in range(words))


def make_conversations(count: int, seed: int) -> list[dict]:
    """One or two turns; answers of one to nine words, so that rows have unequal numbers of targets."""
    draw, examples = random.Random(seed), []
    for _ in range(count):
        turns = [(phrase(draw, draw.randint(1, 4)), phrase(draw, draw.randint(1, 9)))]
        if draw.random() < 0.4:
            turns.append((phrase(draw, 1), phrase(draw, draw.randint(1, 3))))
        examples.append({"messages": [message for turn in turns for message in exchange(*turn)]})
    return examples


def exchange(asked: str, answered: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def make_pairs(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "prompt": phrase(draw, draw.randint(1, 4)),
            "chosen": phrase(draw, draw.randint(2, 6)),
            "rejected": " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))),
        }
        for _ in range(count)
    ]


def write_lines(path: Path, examples: list[dict]) -> str:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def no_samples():
    """Sampling takes longer than all the rest of such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with the data of both stages."""
    folder = tmp_path_factory.mktemp("finetuning")
    for split, count, seed in (("train", 90, 0), ("validation", 21, 1)):
        write_lines(folder / f"sft_{split}.jsonl", make_conversations(count, seed))
        write_lines(folder / f"dpo_{split}.jsonl", make_pairs(count, seed))
    return folder


@pytest.fixture(scope="module")
def base(corpus, tokenizers, work):
    """Folders of small pretrained models without chat tokens; gpt2's tables are tied, llama's are not."""
    folders = {}

    def made(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = work / model_type
            options = {"train_tokens": 256 * 40, "learning_rate": 0.01}
            arguments = recipe_arguments("clm", model_type, corpus, tokenizers, folders[model_type], **options)
            run_recipe("pretrain_clm", arguments)
        return folders[model_type]

    return made


def words_of(stage: str, work: Path, parent, folder, **options) -> list[str]:
    """The command line of a small run; `options` override, None takes an option away."""
    options = {
        "model_name_or_path": parent, "chat_template": CHATML, "output_dir": folder, "max_length": LENGTH,
        "train_data": work / f"{stage}_train.jsonl", "eval_data": work / f"{stage}_validation.jsonl",
        "prepared_dir": work / "prepared", "per_device_train_batch_size": ROWS, "learning_rate": 0.003,
        "precision": "fp32", "compile": "false", "logging_steps": 1, "use_cpu": "true", "max_grad_norm": 0.5,
    } | (
        {"train_tokens": STEPS * ROWS * LENGTH, "batch_tokens": ROWS * LENGTH} if stage == "sft"
        else {"train_pairs": STEPS * ROWS, "batch_pairs": ROWS, "beta": BETA}
    ) | options  # fmt: skip
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def tuned(work, base, tmp_path_factory):
    """Runs a stage with options and returns its folder; the same run is made once."""
    folders = {}

    def run(stage: str, parent="llama", **options) -> Path:
        key = (stage, str(parent), *sorted(options.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp(stage) / "run"
            start = parent if isinstance(parent, Path) else base(parent)
            run_recipe(stage, words_of(stage, work, start, folder, **options))
            folders[key] = folder
        return folders[key]

    return run


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    """With the chat template that is shipped, and its tokens."""
    one = AutoTokenizer.from_pretrained(tokenizers["clm"])
    set_chat_template(one, CHATML)
    return one


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def steps(folder: Path, key: str = "loss") -> list[float]:
    return [entry[key] for entry in history(folder) if "loss" in entry]


def said_by_the_assistant(tokenizer, ids) -> np.ndarray:
    """bool (n,): tokens from the assistant's header to the end of its turn, found without the template's markers."""
    header = tokenizer.encode("<|im_start|>assistant\n")
    learned, inside = np.zeros(len(ids), dtype=bool), False
    for place in range(len(ids)):
        learned[place] = inside
        if ids[place] == tokenizer.convert_tokens_to_ids("<|im_end|>"):
            inside = False
        elif list(ids[max(place + 1 - len(header), 0) : place + 1]) == header:
            inside = True
    return learned


@torch.no_grad()
def log_probabilities(model, ids) -> torch.Tensor:
    """float64 (n - 1,): of each token but the first, in a forward pass of its own."""
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    return model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def loss_alone(model, tokenizer, conversations) -> float:
    """Nats per token of the assistant over conversations that are read one at a time."""
    nats, targets = 0.0, 0
    for ids in conversations:
        learned = torch.as_tensor(said_by_the_assistant(tokenizer, ids)[1:])
        nats -= log_probabilities(model.eval(), ids)[learned].sum().item()
        targets += int(learned.sum())
    return nats / targets


def conversations_of(row) -> list[np.ndarray]:
    return np.split(np.asarray(row["input_ids"], dtype=np.int64), np.cumsum(row["lengths"])[:-1])


def rows_of(folder: Path, work: Path):
    """The rows that a run of SFT on the data in `work` was trained on."""
    lineage = read(folder, "lineage.json")
    return load_prepared(str(work / "prepared" / f"sft-{lineage['data']['fingerprint'][:16]}"))[0]


def logits(model, vocabulary: int = 380) -> torch.Tensor:
    ids = torch.arange(40)[None] * 7 % vocabulary
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder: Path):
    """As anyone would who knows nothing of adapters."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# --- What is learned -------------------------------------------------------------------------------------------------

ASKED = [{"role": "system", "content": "be good"}, {"role": "user", "content": "who is he"}]
EXAMPLES = {
    "several turns": (
        {"messages": [*ASKED, *exchange("", "the old man")[1:], *exchange("and she", "his life")]},
        ["the old man<|im_end|>", "his life<|im_end|>"],
    ),
    "a completion as messages": (
        {"prompt": [*exchange("who", "not this"), ASKED[1]], "completion": exchange("", "the old man")[1:]},
        ["the old man<|im_end|>"],
    ),
    "a completion as text": ({"prompt": "who is he", "completion": " the old man"}, [" the old man<|im_end|>"]),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_only_what_the_assistant_says_is_learned_with_its_end(kind, tokenizer, tmp_path):
    """Labels: the answers and the token that ends them, to the letter; neither prompts, headers nor padding."""
    example, expected = EXAMPLES[kind]
    source = Source(write_lines(tmp_path / "data.jsonl", [example, example]))
    rows, _ = load_prepared(prepare([source], [source], tokenizer, "sft", 256, str(tmp_path / "prepared")))
    batch = DataCollatorForPackedLanguageModeling(tokenizer, max_length=256)([rows["train"][0]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = labels != -100
    assert torch.equal(labels[learned], ids[learned])
    used = len(rows["train"][0]["input_ids"])
    assert used < 256 and not learned[used:].any(), "there is padding, and it is not learned"
    edges = np.flatnonzero(np.diff(learned.int().numpy(), prepend=0, append=0))
    parts = [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]
    assert parts == expected * 2
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("kind", EXAMPLES)
def test_prompts_and_padding_have_no_gradient(kind, tokenizer, base, tmp_path):
    """Of the logits, those alone that predict a token of the assistant have one, through TRL's loss as through ours."""
    from trl.trainer.utils import add_fused_lm_head

    example, expected = EXAMPLES[kind]
    source = Source(write_lines(tmp_path / "data.jsonl", [example, example]))
    rows, _ = load_prepared(prepare([source], [source], tokenizer, "sft", 256, str(tmp_path / "prepared")))
    batch = DataCollatorForPackedLanguageModeling(tokenizer, max_length=256)([rows["train"][0]])
    model = load(base("llama"))
    fit_to_tokenizer(model, tokenizer, 256)
    seen = {}
    model.model.norm.register_forward_hook(lambda module, inputs, output: seen.update(last=output))
    labels = batch.pop("labels")
    ours = cross_entropy_sum(model(**batch, use_cache=False).logits, labels, shift=True)
    gradients = [torch.autograd.grad(ours, seen["last"])[0][0]]
    add_fused_lm_head(model)
    theirs = -model(**batch, labels=labels, fused_lm_head=True).log_probs.sum()
    gradients.append(torch.autograd.grad(theirs, seen["last"])[0][0])
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    predicts = torch.cat([labels[0, 1:] != -100, torch.tensor([False])])
    assert predicts.sum() == sum(len(tokenizer.encode(text)) for text in expected * 2)
    for gradient in gradients:
        assert torch.equal(gradient.abs().sum(-1) > 0, predicts)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_loss_of_trl_moves_an_adapter_as_plain_cross_entropy_does(model_type, base, tokenizer):
    """Also the rows of new tokens, in the input and in the output head, whether these are tied or not."""
    from trl.trainer.utils import add_fused_lm_head

    model = load(base(model_type))
    fit_to_tokenizer(model, tokenizer, LENGTH)
    new = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows = new_token_rows(model, new)
    model = apply_lora_config(model, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=rows))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(0)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, len(tokenizer), (2, 30))
    ids[:, ::4], ids[:, 2::4] = new
    labels = ids.masked_fill(torch.arange(30) < 10, -100)
    ours = cross_entropy_sum(model(input_ids=ids, use_cache=False).logits, labels, shift=True)
    plain = torch.autograd.grad(ours, list(trained.values()))
    add_fused_lm_head(model.get_base_model())
    theirs = -model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum()
    fused = torch.autograd.grad(theirs, list(trained.values()))
    for name, one, two in zip(trained, plain, fused, strict=True):
        assert one.abs().max() > 0, name
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=name)
    assert sum("trainable_tokens" in name for name in trained) == (2 if model_type == "llama" else 1)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_the_loss_of_a_batch_is_the_mean_over_its_conversations(options, tuned, base, tokenizer, work):
    """What is logged at step 1 is what conversations give that are read one at a time by the model from before."""
    folder = tuned("sft", **options)
    rows = rows_of(folder, work)["train"]
    first = rows.select(training_order(len(rows), STEPS * ROWS, 42)[:ROWS])
    targets = [sum(row["targets"]) for row in first]
    assert max(targets) > 1.3 * min(targets), "or a mean of means would pass"
    assert max(len(row["lengths"]) for row in first) > 1, "or nothing is packed"
    model = load(base("llama"))
    fit_to_tokenizer(model, tokenizer, LENGTH)
    alone = loss_alone(model, tokenizer, [one for row in first for one in conversations_of(row)])
    assert steps(folder)[0] == pytest.approx(alone, rel=1e-5)


def test_packed_conversations_do_not_see_each_other(tuned, tokenizer, work):
    folder = tuned("sft")
    model = load(folder)
    model.config.use_cache = False
    row = next(row for row in rows_of(folder, work)["train"] if len(row["lengths"]) > 1)
    batch = DataCollatorForPackedLanguageModeling(tokenizer, max_length=LENGTH)([row])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits[0]
        together = model(batch["input_ids"]).logits[0]
    end = 0
    for ids in conversations_of(row):
        start, end = end, end + len(ids)
        with torch.no_grad():
            torch.testing.assert_close(
                packed[start:end], model(torch.as_tensor(ids)[None]).logits[0], atol=1e-5, rtol=0
            )
    assert (packed[start:end] - together[start:end]).abs().max() > 1e-2, "or this test could not fail"


# --- Chat templates --------------------------------------------------------------------------------------------------

TURN = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}"
MARKED = TURN + "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>{% endif %}{% endfor %}"
TEMPLATES = {
    "nothing ends a turn": (TURN + "{{ m['content'] }}\n{% endif %}{% endfor %}", "writes no token after what the"),
    "its end is not learned": (MARKED, "does not teach where a turn ends (the last learned token is"),
    "the answer is not written": (TURN + "{% endif %}{% endfor %}", "does not write what the assistant says"),
    "it is broken": ("{% for %}", "cannot be rendered"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_teaches_nothing_or_no_end_is_refused(kind, tokenizers, tmp_path):
    text, sentence = TEMPLATES[kind]
    (tmp_path / "chat.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        set_chat_template(AutoTokenizer.from_pretrained(tokenizers["clm"]), str(tmp_path / "chat.jinja"))
    assert sentence in str(error.value) and str(tmp_path / "chat.jinja") in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_that_a_template_writes_are_added_once(tokenizers):
    one = AutoTokenizer.from_pretrained(tokenizers["clm"])
    size = len(one)
    assert set_chat_template(one, CHATML) == ["<|im_start|>", "<|im_end|>"]
    assert one.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [size, size + 1]
    assert one.eos_token == "<|im_end|>" and one.bos_token == "<|endoftext|>" and one.pad_token == "<|pad|>"
    assert set_chat_template(one, CHATML) == [] and set_chat_template(one, None) == []
    assert len(one) == size + 2


SMOLLM2 = ROOT / "models" / "demo" / "smollm2-135m"


@pytest.mark.skipif(not SMOLLM2.exists(), reason="scripts/get_demo_data.py fetches smollm2-135m")
def test_the_template_for_smollm2_writes_what_its_own_does():
    own, shipped = (AutoTokenizer.from_pretrained(SMOLLM2) for _ in range(2))
    assert set_chat_template(shipped, str(ROOT / "recipes" / "templates" / "smollm2.jinja")) == []
    assert own.chat_template != shipped.chat_template
    conversations = [
        ASKED,
        ASKED[1:],
        ASKED + exchange("", " He\nis. ")[1:],
        *(c["messages"] for c in make_conversations(5, 3)),
    ]
    for messages in conversations:
        for prompt in (True, False):
            texts = [
                t.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) for t in (own, shipped)
            ]
            assert texts[0] == texts[1]
    assert shipped.eos_token_id == own.eos_token_id


def test_the_name_of_a_special_token_is_learned_as_characters(tokenizer, tmp_path):
    """Or it could end its own turn, or begin one of the system's."""
    fine, quoting = exchange("who", "he"), exchange("who<|im_end|>", "he")
    source = Source(
        write_lines(tmp_path / "data.jsonl", [{"messages": fine}, {"messages": quoting}, {"messages": fine}])
    )
    rows, manifest = load_prepared(prepare([source], [source], tokenizer, "sft", 64, str(tmp_path / "prepared")))
    assert manifest["splits"]["train"]["documents"] == 3 and manifest["splits"]["train"]["left_out"] == {}
    ends = sum((row["input_ids"] == tokenizer.eos_token_id).sum() for row in rows["train"])
    assert ends == 6
    pairs = [
        {"prompt": "who", "chosen": "he", "rejected": "she<|im_end|>"},
        {"prompt": "<|im_start|>", "chosen": "he", "rejected": "she"},
    ]
    source = Source(write_lines(tmp_path / "pairs.jsonl", pairs))
    rows, manifest = prepare_pairs([source], [source], tokenizer, 64)
    assert len(rows["train"]) == 2 and manifest["splits"]["train"]["left_out"] == {}
    for pair in rows["train"]:
        for key in ("chosen_ids", "rejected_ids"):
            ids = pair["prompt_ids"] + pair[key]
            assert ids.count(tokenizer.eos_token_id) == 2, "the end of the question and of the answer"
    assert tokenizer.decode(rows["train"][0]["rejected_ids"]) == "she<|im_end|><|im_end|>\n"


# --- Supervised fine-tuning ------------------------------------------------------------------------------------------


def test_what_full_fine_tuning_leaves_behind(tuned, base, tokenizer, work):
    folder = tuned("sft")
    metrics, lineage = read(folder, "metrics.json"), read(folder, "lineage.json")
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.02
    model, saved = load(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache is True and model.config.vocab_size == len(saved) == len(tokenizer)
    assert saved.chat_template == tokenizer.chat_template and saved.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == [saved.bos_token_id, saved.eos_token_id]
    assert model.generation_config.pad_token_id == saved.pad_token_id
    alone = [[one for row in rows_of(folder, work)["validation"] for one in conversations_of(row)]]
    assert metrics["eval_loss"] == pytest.approx(loss_alone(model, saved, *alone), rel=1e-5)
    before = load(base("llama"))
    fit_to_tokenizer(before, tokenizer, LENGTH)
    assert metrics["eval_loss_before"] == pytest.approx(loss_alone(before, saved, *alone), rel=1e-5)
    assert metrics["targets"] == sum(said_by_the_assistant(saved, one).sum() for one in alone[0])
    log = read(folder, "history.json")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, STEPS]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, STEPS + 1))
    assert lineage["stage"] == "sft" and lineage["parent"]["lineage"]["stage"] == "pretrain_clm"
    assert lineage["parent"]["weights"] == weights_sha256(str(base("llama"))) != weights_sha256(str(folder))
    assert {"training_args.bin", "incomplete"}.isdisjoint(os.listdir(folder))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['eval_loss']:.4f}" in card and f"{metrics['eval_loss_before']:.4f}" in card


def test_a_finished_run_is_not_tuned_again(tuned, base, work, capsys):
    folder = tuned("sft")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    run_recipe("sft", words_of("sft", work, base("llama"), folder))
    assert "finished" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(("parent", "options"), [("llama", {}), ("llama", LORA), ("gpt2", LORA)])
def test_the_model_stops_by_itself(parent, options, tuned, tmp_path):
    """After a task that it cannot get wrong, also where the token that ends a turn is new and all but it is frozen."""
    data = write_lines(tmp_path / "data.jsonl", [{"messages": exchange(word, "the")} for word in WORDS])
    tokens = {"train_tokens": 60 * ROWS * LENGTH, "lr_scheduler_type": "cosine", "learning_rate": 0.01}
    folder = tuned("sft", parent, train_data=data, eval_data=data, **tokens, **options)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    for word in ("he", "she", "year"):
        prompt = tokenizer.apply_chat_template(exchange(word, "")[:1], add_generation_prompt=True, return_tensors="pt")
        answer = GENERATE(model, **prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == "the<|im_end|>"


ADAPTERS = {"lora": "llama", "tied lora": "gpt2", "rslora": "llama", "dora": "llama"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_loads_as_any_model_does(kind, tuned, base, tokenizer, work):
    """By its folder alone, with the model that had to grow beside it; that model is the parent to the bit."""
    parent = base(ADAPTERS[kind])
    untouched = weights_sha256(str(parent))
    adapter = kind.split()[-1]
    folder = tuned("sft", ADAPTERS[kind], **(LORA | {"adapter": adapter}))
    assert weights_sha256(str(parent)) == untouched
    config = read(folder, "adapter_config.json")
    assert config["base_model_name_or_path"] == "./base"
    assert config["use_rslora"] is (adapter == "rslora") and config["use_dora"] is (adapter == "dora")
    new = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tables = 1 if "tied" in kind else 2
    assert list(config["trainable_token_indices"].values()) == [new] * tables, "every table that is not tied"
    assert sum("trainable_tokens" in name for name in load_file(folder / "adapter_model.safetensors")) == tables

    model, again, below = load(folder), load_and_check_export(AutoModelForCausalLM, str(folder)), load(folder / "base")
    assert torch.equal(logits(model), logits(again))
    assert (logits(model) - logits(below)).abs().max() > 1e-2
    assert model.generation_config.eos_token_id == [0, tokenizer.eos_token_id]
    assert below.config.use_cache is True and not (folder / "model.safetensors").exists()
    grown = load(parent)
    fit_to_tokenizer(grown, tokenizer, LENGTH)
    for name, tensor in grown.state_dict().items():
        assert torch.equal(tensor, below.state_dict()[name]), name
    alone = [one for row in rows_of(folder, work)["validation"] for one in conversations_of(row)]
    metrics = read(folder, "metrics.json")
    assert metrics["eval_loss"] == pytest.approx(loss_alone(model, tokenizer, alone), rel=1e-5)
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.02
    first, second = (again.get_output_embeddings().weight[token] for token in new)
    assert (first - second).abs().max() > 1e-3, "or both new tokens stay equally likely for ever"


# --- Exactness -------------------------------------------------------------------------------------------------------

RUNS = {"sft": ("sft", {}), "sft lora": ("sft", LORA), "dpo": ("dpo", {}), "dpo lora": ("dpo", LORA)}
METRICS = ("eval_loss", "eval_loss_before", "preference_accuracy", "reward_margin", "targets", "train_tokens")


def assert_same_run(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """The loss and the gradient norm of each step, the held-out figures, and what is saved."""
    for key in ("loss", "grad_norm"):
        assert len(steps(one, key)) == STEPS
        assert steps(two, key) == pytest.approx(steps(one, key), rel=tolerance, abs=tolerance), key
    first, second = read(one, "metrics.json"), read(two, "metrics.json")
    for key in first.keys() & set(METRICS):
        assert second[key] == pytest.approx(first[key], rel=tolerance, abs=tolerance), key
    name = "model.safetensors" if (one / "model.safetensors").exists() else "adapter_model.safetensors"
    saved = [load_file(folder / name) for folder in (one, two)]
    assert saved[0].keys() == saved[1].keys()
    for key in saved[0]:
        torch.testing.assert_close(saved[0][key], saved[1][key], rtol=0, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_accumulation_and_the_size_of_an_evaluation_batch_are_no_matter(name, tuned):
    stage, options = RUNS[name]
    pieces = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 5}
    one, two = tuned(stage, **options), tuned(stage, **options, **pieces)
    assert read(two, "lineage.json")["configuration"]["gradient_accumulation_steps"] == ROWS
    assert_same_run(one, two)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_lengths_of_conversations_in_place_of_masks_are_no_matter(options, tuned):
    assert_same_run(tuned("sft", **options), tuned("sft", **options, attn_implementation="varlen"))


def test_pairs_are_padded_and_need_masks(tuned, base, work, tmp_path):
    words = words_of("dpo", work, base("llama"), tmp_path / "run", attn_implementation="varlen")
    with pytest.raises(UserError, match="attn_implementation varlen reads flat batches of packed rows only"):
        run_recipe("dpo", words)


@pytest.fixture(scope="module")
def launched(work, tmp_path_factory):
    """Folders of runs on two processes, one launch for each kind."""
    kinds = {}

    def run(kind: str, names: list[str], parent: Path) -> dict[str, Path]:
        if kind not in kinds:
            folder, todo = tmp_path_factory.mktemp(kind), []
            for name in names:
                stage, options = RUNS[name]
                pieces = options | {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
                todo.append((stage, words_of(stage, work, parent, folder / name.replace(" ", "_"), **pieces)))
            (folder / "runs.json").write_text(json.dumps(todo), encoding="utf-8")
            launch(kind, str(folder / "runs.json"))
            kinds[kind] = {name: folder / name.replace(" ", "_") for name in names}
        return kinds[kind]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_no_matter(name, launched, tuned, base):
    folder = launched("ddp", list(RUNS), base("llama"))[name]
    stage, options = RUNS[name]
    assert read(folder, "lineage.json")["plan"]["world_size"] == 2
    assert_same_run(tuned(stage, **options), folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft lora", "dpo lora", "dpo"])
def test_shards_leave_a_whole_model_behind(name, launched, tuned):
    """ZeRO-3 once saved adapters that were empty. The model that they are for has chat tokens already."""
    parent = tuned("sft")
    folder = launched("zero3", ["sft lora", "dpo lora", "dpo"], parent)[name]
    stage, options = RUNS[name]
    assert read(folder, "lineage.json")["plan"]["zero_stage"] == 3
    single = tuned(stage, parent, **options)
    assert_same_run(single, folder)
    difference = (logits(load(single)) - logits(load(parent))).abs().max()
    assert difference > 0.05, "there is something to save"
    torch.testing.assert_close(logits(load(folder)), logits(load(single)), rtol=0, atol=1e-3)


def test_what_shards_cannot_do_is_refused(tuned, base, monkeypatch):
    from unlabeled.config import FineTuningArguments
    from unlabeled.models import adapters, tuning

    parent = tuned("sft", **LORA)
    for module in (adapters, tuning):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="ZeRO-3 cannot train an adapter for a model without chat tokens; use"):
        new_token_rows(load(base("llama")), [384, 385])
    assert new_token_rows(load(base("llama")), []) is None
    for options in ({"adapter": "none"}, LORA):
        with pytest.raises(UserError, match="is an adapter that ZeRO-3 cannot read; merge it first"):
            tuning.load_for_tuning(FineTuningArguments(model_name_or_path=str(parent), **options))


# --- Resuming --------------------------------------------------------------------------------------------------------

LONG = 10


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_same(base, tuned, work, tmp_path):
    """Each kind of run is killed at a checkpoint; dropout has a random state that a resumed run has to find again."""
    parent = tmp_path / "parent"
    shutil.copytree(base("llama"), parent, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = read(parent, "config.json") | {"attention_dropout": 0.1}
    (parent / "config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = tuned("sft", **LORA)

    def todo(kind: str) -> list:
        runs = []
        for name, (stage, options) in RUNS.items():
            budget = {"train_tokens": LONG * ROWS * LENGTH} if stage == "sft" else {"train_pairs": LONG * ROWS}
            options = options | budget | {"save_steps": 2, "save_total_limit": 2}
            options |= {"lora_dropout": 0.1} if name == "sft lora" else {}
            start, folder = adapter if name == "dpo lora" else parent, tmp_path / kind / name.replace(" ", "_")
            runs.append((stage, words_of(stage, work, start, folder, **options), f"{folder}-batches"))
        return runs

    def work_off(kind: str) -> str:
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(todo(kind)), encoding="utf-8")
        command = [sys.executable, str(ROOT / "tests" / "equality_worker.py"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    for stage, words, log in todo("killed"):
        folder = Path(words[words.index("--output_dir") + 1])
        command = [sys.executable, str(ROOT / "recipes" / f"{stage}.py"), *words]
        kill_at(recorded_command(command, Path(f"{log}-before")), folder, 4)
    said = work_off("killed")
    work_off("whole")
    assert said.count("resuming from ") == len(RUNS)
    for name in (name.replace(" ", "_") for name in RUNS):
        one, two = tmp_path / "whole" / name, tmp_path / "killed" / name
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        digests = [hashlib.sha256((folder / file).read_bytes()).hexdigest() for folder in (one, two)]
        assert digests[0] == digests[1], name
        logs = [Path(f"{folder}-batches{part}") for folder, part in ((one, ""), (two, "-before"), (two, ""))]
        assert_same_order(*logs)
        for key in ("loss", "grad_norm"):
            assert steps(one, key) == steps(two, key) and len(steps(one, key)) == LONG, name
        for key in ("eval_loss", "eval_loss_before"):
            figures = [read(folder, "metrics.json")[key] for folder in (one, two)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-6), name  # sums differ with where memory lies


def kill_at(command: list[str], folder: Path, step: int) -> None:
    """Start a run and kill it when the checkpoint of `step` is there."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (folder / f"checkpoint-{step}").exists() and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()[-3000:]
    assert not (folder / "metrics.json").exists(), "killed too late: the test would prove nothing"


# --- Preference tuning, and adapters after adapters ------------------------------------------------------------------


@torch.no_grad()
def preferences(folder: Path, reference, work: Path) -> dict[str, float]:
    """The figures of a run, computed from its folder and the reference alone, one answer at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    won, margins = [], []
    for line in (work / "dpo_validation.jsonl").read_text(encoding="utf-8").splitlines():
        pair, sums = json.loads(line), {}
        asked = exchange(pair["prompt"], "")[:1]
        start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"])
        for key in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(exchange(pair["prompt"], pair[key]), return_dict=True)["input_ids"]
            sums[key] = [log_probabilities(one, ids)[start - 1 :].sum().item() for one in (model, reference)]
        won.append(sums["chosen"][0] > sums["rejected"][0])
        margins.append(BETA * (sums["chosen"][0] - sums["chosen"][1] - sums["rejected"][0] + sums["rejected"][1]))
    return {
        "preference_accuracy": np.mean(won),
        "reward_accuracy": np.mean(np.array(margins) > 0),
        "reward_margin": np.mean(margins),
        "eval_loss": np.mean(np.log1p(np.exp(-np.array(margins)))),
    }


@pytest.mark.parametrize("name", ["dpo", "dpo lora", "dpo lora on lora", "dpo on lora"])
def test_preferences_are_what_the_saved_model_and_its_reference_say(name, tuned, base, tokenizer, work):
    options = LORA if name.startswith("dpo lora") else {}
    if name.endswith("on lora"):
        parent = tuned("sft", **LORA)
        folder, reference = tuned("dpo", parent, **options), load(parent)
    else:
        folder, reference = tuned("dpo", **options), load(base("llama"))
        fit_to_tokenizer(reference, tokenizer, LENGTH)
    metrics = read(folder, "metrics.json")
    assert metrics["pairs"] == 21
    for key, value in preferences(folder, reference, work).items():
        assert metrics[key] == pytest.approx(value, abs=1e-4), key
    assert abs(metrics["reward_margin"]) > 0.01, "it has moved"
    before = next(entry for entry in read(folder, "history.json") if "eval_loss" in entry)
    assert before["step"] == 0 and abs(before["reward_margin"]) < 1e-6 and before["reward_accuracy"] == 0.5
    assert metrics["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps(folder)[0] == pytest.approx(math.log(2), abs=1e-6), "the first step is that of the reference itself"


@pytest.mark.parametrize("parent", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [LORA, {}], ids=["lora", "full"])
def test_an_adapter_after_an_adapter_keeps_both(parent, options, tuned):
    """With a learning rate of 0 the second stage is the first, not the model below both."""
    first = tuned("sft", parent, **LORA)
    second = tuned("dpo", first, learning_rate=0.0, **options)
    expected = logits(load(first))
    torch.testing.assert_close(logits(load(second)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(load_and_check_export(AutoModelForCausalLM, str(second))), expected, rtol=0, atol=1e-5
    )
    assert (logits(load(first / "base")) - expected).abs().max() > 1e-2, "or this test could not fail"
    assert not (second / "ref").exists()
    assert (second / "model.safetensors").exists() is not bool(options), "full tuning merges the adapter"
    lineage = read(second, "lineage.json")
    assert lineage["parent"]["weights"] == weights_sha256(str(first))
    assert lineage["parent"]["lineage"]["parent"]["lineage"]["stage"] == "pretrain_clm"
    assert load(second).generation_config.eos_token_id == load(first).generation_config.eos_token_id


def test_full_fine_tuning_goes_on_from_an_adapter(tuned):
    first = tuned("sft", **LORA)
    second = tuned("sft", first)
    metrics = read(second, "metrics.json")
    assert metrics["eval_loss_before"] == pytest.approx(read(first, "metrics.json")["eval_loss"], rel=1e-5)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    before, after = load(first / "base").state_dict(), weights(second)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in after), "all weights are trained"


@pytest.mark.parametrize("name", ["dpo", "dpo lora", "dpo lora on lora"])
def test_a_reference_that_is_computed_beforehand_is_the_same(name, tuned):
    options = LORA if "lora" in name else {}
    parent = tuned("sft", "gpt2", **LORA) if name.endswith("on lora") else "llama"
    assert_same_run(tuned("dpo", parent, **options), tuned("dpo", parent, **options, precompute_ref_log_probs="true"))


# --- Bad input -------------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kept(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if not name.startswith("prepared/")}


@pytest.fixture
def refused(base, work, tmp_path, capfd):
    """Runs a stage that refuses; returns its sentence. Nothing was trained, written or overwritten."""

    def run(stage: str, parent="llama", data: list[dict] | None = None, **options) -> str:
        if data is not None:
            options["train_data"] = write_lines(tmp_path / "spoilt.jsonl", data)
        start = parent if isinstance(parent, Path) else base(parent)
        options = {"output_dir": tmp_path / "run", "prepared_dir": tmp_path / "prepared"} | options
        words = words_of(stage, work, start, options.pop("output_dir"), **options)
        before = kept(tmp_path), kept(work)
        capfd.readouterr()  # of the base, where this test is the first to need it
        with pytest.raises(UserError) as error:
            run_recipe(stage, words)
        assert (kept(tmp_path), kept(work)) == before
        assert "\n" not in str(error.value) and "loss" not in capfd.readouterr().out
        return str(error.value)

    return run


USER = {"role": "user", "content": "who"}
PAIR = {"prompt": "who", "chosen": "he", "rejected": "she"}
BAD = {
    "no columns of ours": ("sft", [{"text": "one"}], "row 0 of {file} is no conversation; give it"),
    "half a message": ("sft", [{"messages": [{"role": "user"}]}], "row 0 of {file} is no conversation: a message of"),
    "a completion is missing": ("sft", [{"prompt": "who"}], "row 0 of {file} is no conversation; give it"),
    "no turn of the assistant": (
        "sft",
        [{"messages": [USER]}] * 3,
        "{file} has nothing to learn from (3 with no turn of the assistant); correct it",
    ),
    "nothing fits": (
        "sft",
        [{"messages": exchange("who", "he " * count)} for count in (50, 99, 70)],
        f"no conversation of the train data fits into max_length {LENGTH}; raise it: the shortest has 122 tokens, half "
        "of them have 162 or fewer",
    ),
    "no rejected": ("dpo", [PAIR, {"prompt": "who", "chosen": "he"}], "row 1 of {file} has no rejected; preferences"),
    "an empty chosen": ("dpo", [PAIR, PAIR | {"chosen": ""}], "row 1 of {file} has no chosen; preferences need"),
    "no prompt": ("dpo", [{"prompt": None, "chosen": "he", "rejected": "she"}], "row 0 of {file} has no prompt;"),
    "no pair fits": (
        "dpo",
        [PAIR | {"chosen": "he " * 99}] * 2,
        f"train_data has no pair of answers that fits into max_length {LENGTH}; raise it: the shortest has 220 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_spoilt_rows(kind, refused, tmp_path):
    stage, data, sentence = BAD[kind]
    assert refused(stage, data=data).startswith(sentence.format(file=tmp_path / "spoilt.jsonl"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_keys_that_cannot_be(stage, refused, tmp_path):
    missing = str(tmp_path / "none.jinja")
    assert refused(stage, chat_template=missing) == (
        f"chat_template: cannot read {missing} (No such file or directory); recipes/templates/chatml.jinja is one"
    )
    assert "has no chat template; set chat_template, for example to" in refused(stage, chat_template=None)
    assert refused(stage, adapter="lorra") == "adapter: 'lorra' is none of none, lora, rslora, dora, qlora"
    if not torch.cuda.is_available():
        assert refused(stage, adapter="qlora") == "adapter: qlora needs a GPU for bitsandbytes; set it to lora"
    assert refused(stage, adapter="lora", lora_r=0) == "lora_r is 0; set it to 1 or more"
    names = {"adapter": "lora", "lora_target_modules": "q_proj,nose"}
    assert "nose" in refused(stage, **names | {"lora_target_modules": "nose"})
    assert "leave it out" in refused(stage, **names | {"lora_target_modules": "q_proj,lm_head"})
    assert refused(stage, model_name_or_path=tmp_path / "none").startswith("model_name_or_path: there is no folder")


def test_budgets_that_cannot_be(refused):
    assert refused("dpo", train_tokens=1024) == "remove train_tokens: set train_pairs instead"
    assert refused("dpo", batch_pairs=12).startswith("batch_pairs 12 does not divide into rows of")
    assert refused("dpo", train_pairs=12).startswith("train_pairs 12 does not divide into steps of batch_pairs 8")
    assert refused("dpo", train_pairs=None) == "set train_pairs: budgets are in pairs"
    assert refused("sft", batch_tokens=500).startswith("batch_tokens 500 does not divide into rows of")
    assert "packing" in refused("sft", packing="true")


def test_another_adapter_than_the_one_that_is_there(refused, tuned, tmp_path):
    parent = tuned("sft", **LORA)
    other = {"lora_r": 8, "lora_alpha": 32, "adapter": "dora", "lora_dropout": 0.5}
    for key, wanted in other.items():
        sentence = refused("dpo", parent, **LORA | {key: wanted})
        assert (
            sentence.startswith(f"{parent} is an adapter with {key} ") and f", not {wanted}; set {key} to" in sentence
        )
    text = Path(CHATML).read_text(encoding="utf-8").replace("im_end", "im_over")
    (tmp_path / "other.jinja").write_text(text, encoding="utf-8")
    sentence = refused("sft", parent, chat_template=tmp_path / "other.jinja", **LORA)
    assert sentence == f"{parent} is an adapter; merge it before you change its chat template"


def test_a_folder_of_another_run_is_not_overwritten(refused, tuned):
    folder = tuned("sft")
    before = hashes(folder)
    assert f"{folder} holds a run with learning_rate 0.003, not 0.02" in refused(
        "sft", output_dir=folder, learning_rate=0.02
    )
    assert hashes(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft"])
def test_a_bad_row_in_a_process_of_its_own(stage, base, work, tmp_path):
    data = write_lines(tmp_path / "spoilt.jsonl", [{"text": "one"}])
    words = words_of(stage, work, base("llama"), tmp_path / "run", train_data=data)
    command = [sys.executable, str(ROOT / "recipes" / f"{stage}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith(f"error: row 0 of {data} is no conversation;") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
