"""Sentence embeddings: one softmax a batch however it is cut up, exact order and resume, folders that others load."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from batch_log import assert_same_order, recorded_batches
from conftest import MODELS, SPAN_MODELS, WORDS, run_recipe, weights
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from test_equality import launch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5EncoderModel,
)

from unlabeled import UserError
from unlabeled.data.pairs import order_of_pairs
from unlabeled.training.embedding import ExactSentenceTransformerTrainer

STEPS, BATCH, LENGTH = 3, 16, 24
HEADS = {
    "bert": (AutoModelForMaskedLM, "mlm"),
    "modernbert": (AutoModelForMaskedLM, "mlm"),
    "t5": (AutoModelForSeq2SeqLM, "clm"),
}


def passage(draw: random.Random) -> tuple[str, str]:
    at, cut, end = draw.randrange(len(WORDS)), draw.randint(2, 9), draw.randint(12, 16)
    words = [WORDS[(at + i * i) % len(WORDS)] for i in range(end)]
    return " ".join(words[:cut]), " ".join(words[cut:])


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with pairs; held-out ones are graded."""
    folder, draw = tmp_path_factory.mktemp("embed"), random.Random(0)
    for split, count in (("train", 40), ("validation", 21)):
        found = {anchor: positive for positive, anchor in dict(map(passage, [draw] * 2 * count)).items()}
        rows = [{"anchor": positive, "positive": anchor} for anchor, positive in found.items()]  # no text twice
        rows = rows[:count]
        for i, row in enumerate(rows if split == "validation" else []):
            row |= {"same_work": rows[i - 1]["positive"], "other_work": rows[i - 2]["positive"]}
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def base(work, tokenizers):
    """Makes the folder of a small model with its head, as a recipe of pretraining leaves it; `dropout` where asked."""

    def made(model_type: str, dropout: float = 0.0) -> Path:
        folder = work / f"{model_type}-{dropout}"
        if not folder.exists():
            torch.manual_seed(0)
            auto_class, kind = HEADS.get(model_type, (AutoModelForCausalLM, "clm"))
            sizes = {k: dropout if "drop" in k else v for k, v in (MODELS | SPAN_MODELS)[model_type].items()}
            tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
            ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            ids |= {"decoder_start_token_id": 0} if model_type == "t5" else {"initializer_range": 0.3}
            config = AutoConfig.for_model(model_type, **sizes, **ids)
            auto_class.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return made


def words_of(work: Path, parent, folder, **options) -> list[str]:
    options = {
        "model_name_or_path": parent, "output_dir": folder, "max_length": LENGTH,
        "train_data": work / "train.jsonl", "eval_data": work / "validation.jsonl",
        "train_pairs": STEPS * BATCH, "batch_pairs": BATCH, "per_device_train_batch_size": BATCH,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0, "precision": "fp32",
        "logging_steps": 1, "use_cpu": "true", "adam_epsilon": 0.01,  # or rounding counts in tiny gradients
    } | options  # fmt: skip
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def single(work, base) -> Path:
    """A run of bert on one process that embeds the whole batch at once."""
    run_recipe("embed", words_of(work, base("bert"), work / "single"))
    return work / "single"


def read(folder: Path, name: str = "metrics"):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def assert_same(folder: Path, other: Path, tolerance: float) -> None:
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=tolerance, msg=name)
    assert read(other)["eval_loss"] == pytest.approx(read(folder)["eval_loss"], abs=1e-5)
    for name in ("accuracy_at_1", "mrr", "spearmanr"):  # of ranks: rounding may swap two texts that are equally near
        assert read(other)[name] == pytest.approx(read(folder)[name], abs=5e-3), name
    for one, two in zip(*(read(run, "history") for run in (folder, other)), strict=True):
        for name in one.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])


def mean_of(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Embeddings (texts, width) as anybody would compute them, one text at a time."""
    encoded = [tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt") for text in texts]
    return torch.cat([model(**one).last_hidden_state.mean(dim=1) for one in encoded])


# --- Training ---------------------------------------------------------------------------------------------------------


def test_the_first_step_is_that_of_the_formula(single, base, work):
    """Loss and norm of the gradient of one softmax over the cosines of a batch, without any library for it."""
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]

    class Arguments:
        train_pairs, batch_pairs, seed = STEPS * BATCH, BATCH, 42

    batch = [rows[place] for place in order_of_pairs(len(rows), Arguments)[:BATCH]]
    model, tokenizer = AutoModel.from_pretrained(base("bert")), AutoTokenizer.from_pretrained(base("bert"))
    anchors, positives = (mean_of(model.eval(), tokenizer, [r[name] for r in batch]) for name in ("anchor", "positive"))
    cosines = F.normalize(anchors) @ F.normalize(positives).T
    loss = F.cross_entropy(20 * cosines, torch.arange(BATCH))
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    first = next(entry for entry in read(single, "history") if "loss" in entry)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert first["grad_norm"] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)
    assert loss > 0.5  # there is something to learn


def test_how_a_batch_is_cut_up_is_no_matter(single, work, base):
    pieces = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
    run_recipe("embed", words_of(work, base("bert"), work / "pieces", **pieces))
    assert_same(single, work / "pieces", 1e-5)
    moved = weights(single)["encoder.layer.0.attention.self.query.weight"]
    start = AutoModel.from_pretrained(base("bert")).encoder.layer[0].attention.self.query.weight
    assert (moved - start).abs().max() > 1e-3


@pytest.mark.slow
def test_two_processes_are_no_matter(single, work, base):
    words = words_of(work, base("bert"), work / "two", per_device_train_batch_size=4)
    (work / "runs.json").write_text(json.dumps([["embed", words]]), encoding="utf-8")
    launch("ddp", str(work / "runs.json"))
    assert read(work / "two", "lineage")["plan"]["world_size"] == 2, "each process trained alone"
    assert_same(single, work / "two", 1e-5)


def test_resumed_is_bit_for_bit_the_same(work, base, tmp_path):
    """With dropout, from a checkpoint in the middle of the second epoch."""
    words = words_of(work, base("bert", 0.1), work / "whole", save_steps=2, per_device_train_batch_size=8)
    with recorded_batches(tmp_path / "batches-of-whole"):
        run_recipe("embed", words)
    again = work / "again"
    shutil.copytree(work / "whole" / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(work / "whole" / "run.json", again)
    words[words.index("--output_dir") + 1] = str(again)
    with recorded_batches(tmp_path / "batches-of-rest"):
        run_recipe("embed", words)
    assert_same_order(tmp_path / "batches-of-whole", tmp_path / "batches-of-rest", first=3)
    one, two = weights(work / "whole"), weights(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[e["loss"] for e in read(run, "history") if "loss" in e] for run in (work / "whole", again)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_no_batch_holds_a_pair_twice_and_every_epoch_is_another():
    class Arguments:
        train_pairs, batch_pairs, seed = 96, 16, 0

    order = order_of_pairs(40, Arguments)
    assert len(order) == 96
    assert all(len(set(order[start : start + 16])) == 16 for start in range(0, 96, 16))
    epochs = [set(order[start : start + 32]) for start in range(0, 96, 32)]
    assert all(len(epoch) == 32 for epoch in epochs) and epochs[0] != epochs[1]
    with pytest.raises(UserError, match="train_data has 15 pairs and batch_pairs is 16"):
        order_of_pairs(15, Arguments)


# --- Held-out figures -------------------------------------------------------------------------------------------------


class Table:
    """A model that embeds by looking up."""

    training = True

    def __init__(self, vectors: dict):
        self.vectors = vectors

    def train(self, mode: bool):
        self.training = mode

    def encode(self, texts, **_):
        self.training = False
        return F.normalize(torch.tensor([self.vectors[text] for text in texts], dtype=torch.float32))


def test_figures_are_those_of_an_example_by_hand():
    """Three anchors: the first finds its positive, the second finds it third, the third ties with another."""
    table = Table(
        {
            "a": [1, 0, 0],
            "A": [1, 0, 0],
            "b": [0, 1, 0],
            "B": [0, -1, 0],
            "c": [0, 0, 1],
            "C": [0, 1, 0],
            "x": [0.6, 0.8, 0],
            "y": [0, 0.6, 0.8],
        }
    )

    class Self:
        model = table
        eval_dataset = Dataset.from_list([{"anchor": k, "positive": k.upper()} for k in "abc"])

        class args:
            batch_pairs, per_device_eval_batch_size = 2, 8

    found = ExactSentenceTransformerTrainer.held_out_metrics(Self, Self.eval_dataset, "eval")
    assert found["accuracy_at_1"] == pytest.approx(1 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)  # ties count as lost: all three are 0 for "c"
    # Each with the next positive: cosines (1, 0), (-1, 1), (0, 0).
    expected = [[1, 0], [-1, 1], [0, 0]]
    loss = F.cross_entropy(20 * torch.tensor(expected, dtype=torch.float32), torch.zeros(3, dtype=torch.long))
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert "spearmanr" not in found and table.training
    graded = [{"anchor": "a", "positive": "A", "same_work": "x", "other_work": "y"}]
    Self.eval_dataset = Dataset.from_list(graded)
    assert ExactSentenceTransformerTrainer.held_out_metrics(Self, Self.eval_dataset, "eval")[
        "spearmanr"
    ] == pytest.approx(1)
    Self.eval_dataset = Dataset.from_list([graded[0] | {"positive": "y", "other_work": "A"}])
    assert ExactSentenceTransformerTrainer.held_out_metrics(Self, Self.eval_dataset, "eval")[
        "spearmanr"
    ] == pytest.approx(-1)


# --- What is left behind ----------------------------------------------------------------------------------------------


def test_the_folder_is_everybodys(single, work):
    for name in ("loss.png", "lineage.json", "README.md", "samples.md", "modules.json", "tokenizer.json"):
        assert (single / name).exists(), name
    texts = ["the of and", "you must not"]
    model, info = AutoModel.from_pretrained(single, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = mean_of(model.eval(), AutoTokenizer.from_pretrained(single), texts)
    found = SentenceTransformer(str(single), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    card, metrics = (single / "README.md").read_text(), read(single)
    assert 'SentenceTransformer("single")' in card and "pipeline_tag: sentence-similarity" in card
    assert {f"{name}_before" for name in ("eval_loss", "accuracy_at_1", "mrr", "spearmanr")} <= metrics.keys()
    assert metrics["train_pairs"] == STEPS * BATCH and metrics["eval_loss"] < metrics["eval_loss_before"]
    assert read(single, "lineage")["stage"] == "embed"


def test_a_causal_model_pools_as_told_and_may_see_both_sides(work, base):
    folders = {}
    for name, options in {"last": {"pooling": "lasttoken"}, "both": {"is_causal": "false"}}.items():
        folders[name] = work / f"llama-{name}"
        run_recipe("embed", words_of(work, base("llama"), folders[name], train_pairs=BATCH, **options))
    last, both = (SentenceTransformer(str(folders[name]), device="cpu") for name in ("last", "both"))
    states = {}
    for name, model in (("last", last), ("both", both)):
        tokens = [model.encode(text, output_value="token_embeddings") for text in ("the of and", "the of you")]
        states[name] = (tokens[0][0] - tokens[1][0]).abs().max()
    assert states["last"] == 0 and states["both"] > 1e-3
    tokens = last.encode("the of and", output_value="token_embeddings")
    torch.testing.assert_close(torch.tensor(last.encode("the of and")), tokens[-1])


def test_the_encoder_of_an_encoder_decoder_is_enough(work, base):
    folder, texts = work / "t5", ["the of and", "you must not"]
    run_recipe("embed", words_of(work, base("t5"), folder, train_pairs=BATCH))
    assert not [name for name in weights(folder) if "decoder" in name]
    with torch.no_grad():
        model = T5EncoderModel.from_pretrained(folder).eval()
        expected = mean_of(model, AutoTokenizer.from_pretrained(folder), texts)
        start = mean_of(T5EncoderModel.from_pretrained(base("t5")), AutoTokenizer.from_pretrained(folder), texts)
    found = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - start).abs().max() > 1e-3


def test_an_adapter_reloads_and_a_finished_embedder_is_continued_as_it_is(single, work, base):
    options = {"adapter": "lora", "lora_r": 4, "train_pairs": BATCH, "lora_target_modules": "query,value"}
    run_recipe("embed", words_of(work, base("modernbert"), work / "all", adapter="dora", train_pairs=BATCH))
    folder = work / "lora"
    run_recipe("embed", words_of(work, single, folder, **options))
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    adapted, plain = (SentenceTransformer(str(path), device="cpu").encode("the of and") for path in (folder, single))
    assert abs(adapted - plain).max() > 1e-3  # check_saved has compared it with the one that was trained
    assert read(folder, "lineage")["plan"]["trainable_parameters"] < 0.2 * read(folder)["parameters"]
    with pytest.raises(UserError, match="is an adapter; merge it first"):
        run_recipe("embed", words_of(work, folder, work / "never"))
    with pytest.raises(UserError, match="has a pooling of its own; remove pooling"):
        run_recipe("embed", words_of(work, single, work / "never", pooling="cls"))
    with pytest.raises(UserError, match=r"lora_target_modules: .*all-linear fits any model"):
        run_recipe("embed", words_of(work, single, work / "never", **options | {"lora_target_modules": "nothing"}))
    assert not (work / "never").exists()


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"anchor": "a", "text": "b"}], "row 0 of .* has no anchor or no positive"),
        ([{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": " "}], "row 1 of .* has no anchor or no posi"),
        ([{"anchor": "a", "positive": "b"}], "train_data has 1 pairs and batch_pairs is 16"),
        ([{"anchor": "a", "positive": "b"}] * 20, "train_data has 1 pairs and batch_pairs is 16"),  # repeated
    ],
)
def test_bad_pairs_are_refused(rows, message, work, base, tmp_path):
    data = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=message):
        run_recipe("embed", words_of(work, base("bert"), tmp_path / "run", train_data=data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_pairs": 18, "train_pairs": 36}, "batch_pairs 18 does not divide"),
        ({"gradient_accumulation_steps": 2}, "remove gradient_accumulation_steps"),
        ({"deepspeed": "ds_configs/zero2.json"}, "remove deepspeed"),
        ({"pooling": "average"}, "pooling"),
        ({"adapter": "lora", "is_causal": "false"}, "is_causal"),
    ],
)
def test_what_would_not_be_exact_is_refused(options, message, work, base, tmp_path):
    with pytest.raises(UserError, match=message):
        run_recipe("embed", words_of(work, base("bert"), tmp_path / "run", **options))


def test_long_texts_are_cut_and_counted(work, base, tmp_path):
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    rows[0]["anchor"] = " ".join(WORDS)
    data = write_lines(tmp_path / "long.jsonl", rows)
    run_recipe("embed", words_of(work, base("bert"), tmp_path / "run", train_data=data, train_pairs=BATCH))
    split = read(tmp_path / "run", "lineage")["data"]["splits"]["train"]
    assert split["truncated"] >= 1 and not split["left_out"] and split["documents"] == len(rows)


@pytest.mark.parametrize("should_save", [True, False])
def test_one_process_writes_the_model(should_save, tmp_path, monkeypatch):
    """sentence-transformers would write in all of them, so that files change while a checkpoint is sealed."""

    def write(self, output_dir, state_dict=None):
        Path(output_dir, "training_args.bin").write_text("")
        Path(output_dir, "config.json").write_text("")

    monkeypatch.setattr(SentenceTransformerTrainer, "_save", write)
    trainer = object.__new__(ExactSentenceTransformerTrainer)
    trainer.args = SimpleNamespace(should_save=should_save)
    trainer._save(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == (["config.json"] if should_save else [])
