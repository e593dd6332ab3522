"""Labels: words find their tokens, losses and scores are exact however a batch is divided, heads come back."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batch_log import assert_same_order, recorded_batches
from conftest import MODELS, SPAN_MODELS, WORDS, run_recipe, weights
from test_equality import launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from unlabeled import UserError
from unlabeled.data.collators import DataCollatorForClassification
from unlabeled.data.label_encoding import encode_framed
from unlabeled.data.labeled_rows import read_task
from unlabeled.data.rows import LengthGroupedRows
from unlabeled.data.sources import parse_sources
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models.classification import check_direction, load_with_new_head
from unlabeled.runtime.checkpoints import find_checkpoints
from unlabeled.training.classification import METRICS, summed_loss

KINDS = {"bert": ("mlm", AutoModelForMaskedLM), "modernbert": ("mlm", AutoModelForMaskedLM),
         "llama": ("clm", AutoModelForCausalLM), "gpt2": ("clm", AutoModelForCausalLM),
         "t5": ("span", AutoModelForSeq2SeqLM)}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tokenizers, tmp_path_factory):
    """Makes the folder of an untrained model with its tokenizer, as the recipes of pretraining leave one."""
    folders = {}

    def make(model_type: str) -> str:
        if model_type not in folders:
            objective, auto_class = KINDS[model_type]
            tokenizer = load_tokenizer(tokenizers[objective])
            sizes = (MODELS | SPAN_MODELS)[model_type]
            ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "eos", "bos", "cls", "sep")}
            if model_type == "t5":
                ids["decoder_start_token_id"] = tokenizer.pad_token_id
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **sizes)
            folders[model_type] = str(tmp_path_factory.mktemp("checkpoints") / model_type)
            auto_class.from_config(config).save_pretrained(folders[model_type])
            tokenizer.save_pretrained(folders[model_type])
        return folders[model_type]

    return make


@pytest.fixture(scope="session")
def labeled(tmp_path_factory) -> dict[str, str]:
    """{"classes": folder, "numbers": ..., "tags": ...}: a class for each half of the words, a place for some."""
    rng, folders = np.random.default_rng(0), {}
    for kind in ("classes", "numbers", "tags"):
        folders[kind] = str(folder := tmp_path_factory.mktemp(kind))
        for split, size in (("train", 90), ("validation", 23), ("test", 21)):
            lines = []
            for _ in range(size):
                half, length = int(rng.integers(2)), int(rng.integers(2, 14))
                words = [WORDS[half * 60 + int(i)] for i in rng.integers(0, 60, length)]
                row = {"text": " ".join(words), "label": "late" if half else "early"}
                if kind == "numbers":
                    row["label"] = half * 2 - 1 + length / 20
                if kind == "tags":
                    tags = ["B-LOC" if "o" in word else "O" for word in words]
                    row = {"tokens": words, "ner_tags": tags}
                lines.append(json.dumps(row))
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folders


@pytest.fixture
def arguments(checkpoints, labeled, tmp_path):
    """Makes (output_dir, recipe, its arguments) of a small run: six steps of eight examples."""

    def make(kind: str, model_type: str, name: str = "run", **options) -> tuple[Path, str, list[str]]:
        data, out = labeled[kind], tmp_path / name
        columns = {"text_column": "tokens", "label_column": "ner_tags"} if kind == "tags" else {}
        options = {
            "model_name_or_path": checkpoints(model_type), "train_data": f"{data}/train.jsonl",
            "eval_data": f"{data}/validation.jsonl", "test_data": f"{data}/test.jsonl", **columns, "output_dir": out,
            "max_length": 32, "train_examples": 48, "batch_examples": 8, "per_device_train_batch_size": 8,
            "learning_rate": 0.01, "max_grad_norm": 0.5, "precision": "fp32", "logging_steps": 1, "use_cpu": "true",
        } | options  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return out, "tag" if kind == "tags" else "classify", words

    return make


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def same(first: dict, second: dict, prefixes=("eval_", "test_"), tolerance: float = 1e-5) -> None:
    for key in (key for key in first if key.startswith(prefixes)):
        assert second[key] == pytest.approx(first[key], abs=tolerance), key


# --- Words and their tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["clm", "mlm", "span"])
def test_words_have_the_tokens_of_a_running_text(objective, tokenizers):
    """So a pipeline, which reads text, sees what was trained on. A space may be part of a word's first token, or it."""
    tokenizer = load_tokenizer(tokenizers[objective])
    words = ["people", "out", "of", "time", "unseenword", "!"]
    found = encode_framed(tokenizer, [words], 64, words=True)[0]
    text = " ".join(words)
    inputs = tokenizer(text, return_offsets_mapping=True)
    assert found.input_ids.tolist() == inputs["input_ids"]
    assert list(found.first_tokens) == list(range(len(words)))
    starts = np.cumsum([0] + [len(word) + 1 for word in words])[:-1]
    for word, place in found.first_tokens.items():
        assert inputs["offset_mapping"][place][0] in (starts[word], starts[word] - 1)


def test_golden_alignment_with_a_word_without_tokens_and_a_cut_sentence(tokenizers):
    tokenizer = load_tokenizer(tokenizers["mlm"])
    found = encode_framed(tokenizer, [["the", "\u200b", "and"], ["the"] * 9], 6, words=True)
    assert tokenizer.convert_ids_to_tokens(found[0].input_ids) == ["[CLS]", "the", "and", "[SEP]"]
    assert found[0].first_tokens == {0: 1, 2: 2} and not found[0].is_truncated
    assert tokenizer.convert_ids_to_tokens(found[1].input_ids) == ["[CLS]", *["the"] * 4, "[SEP]"]
    assert found[1].first_tokens == {0: 1, 1: 2, 2: 3, 3: 4} and found[1].is_truncated


@pytest.mark.parametrize("objective", ["clm", "mlm", "span"])
def test_special_tokens_that_a_text_names_are_text(objective, tokenizers):
    tokenizer = load_tokenizer(tokenizers[objective])
    name = tokenizer.eos_token or tokenizer.sep_token
    ids = encode_framed(tokenizer, [[f"the {name} and"]], 32, words=False)[0].input_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids(name)) == {"clm": 0, "mlm": 1, "span": 1}[objective]


def read(path, tokenizers, words=False, max_length=16, **more):
    columns, label = (["tokens"], "ner_tags") if words else (["text"], "label")
    sources = {key: parse_sources(str(more.get(key, path)), key) for key in ("train", "evaluation")} | {"test": []}
    tokenizer = load_tokenizer(tokenizers["mlm"])
    return read_task(
        **sources, columns=columns, label_column=label, words=words, tokenizer=tokenizer, max_length=max_length
    )


def test_words_that_are_not_seen_count_as_outside(tokenizers, tmp_path):
    """Their truth stays in the score; no token of theirs carries a loss."""
    path = tmp_path / "words.jsonl"
    rows = [{"tokens": ["the", "\u200b", "and"], "ner_tags": ["O", "B-X", "B-Y"]},
            {"tokens": ["the"] * 9, "ner_tags": ["B-X"] * 9}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    task, splits, manifest = read(path, tokenizers, words=True, max_length=6)
    train = splits["train"]
    assert task.names == ["B-X", "B-Y", "O"] and task.metric == "entities" and task.names[task.outside] == "O"
    assert train.truth.tolist() == [2, 0, 1] + [0] * 9 and train.counts.tolist() == [3, 9]
    assert [place.tolist() for place in train.visible_targets] == [[0, 2], [3, 4, 5, 6]]
    assert train.rows[0]["labels"].tolist() == [IGNORE_INDEX, 2, 1, IGNORE_INDEX]
    assert (train.unseen, train.truncated) == (6, 1) and manifest["splits"]["train"]["unseen_words"] == 6


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"text": "a b", "label": "x"}, {"text": "a", "label": None}], False, "row 1 of .* has no label in label"),
        ([{"text": "a b", "label": "x"}, {"text": " ", "label": "y"}], False, "row 1 of .* has no text in text"),
        ([{"text": "a", "label": "x"}] * 2, False, "all of train_data has the label 'x'"),
        ([{"text": "a", "category": "x"}], False, "no column 'label'; set label_column to one of: text, category"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": -100.0}], False, "a number, and not -100"),
        ([{"tokens": ["a", "b"], "ner_tags": ["O"]}], True, "row 0 of .* has 2 words and 1 tags"),
        ([{"tokens": [], "ner_tags": []}], True, "no list of words or tags in tokens"),
    ],
)
def test_bad_labels_are_named(rows, words, message, tokenizers, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        read(path, tokenizers, words)


def test_a_label_that_training_does_not_have_is_named(labeled, tokenizers, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"text": "the", "label": "noon"}))
    with pytest.raises(UserError, match=r"other\.jsonl has the label 'noon', which train_data does not have"):
        read(Path(labeled["classes"], "train.jsonl"), tokenizers, evaluation=path)


def test_held_out_examples_come_from_the_training_data_alone(labeled, tokenizers):
    train, test = (parse_sources(f"{labeled['classes']}/{name}.jsonl", "x") for name in ("train", "test"))
    tokenizer = load_tokenizer(tokenizers["mlm"])
    _, whole, _ = read_task(train, train, test, ["text"], "label", False, tokenizer, 32)
    _, cut, _ = read_task(train, [], test, ["text"], "label", False, tokenizer, 32, eval_fraction=0.3)
    assert cut["test"].texts == whole["test"].texts
    assert cut["train"].rows and cut["validation"].rows
    assert sorted(cut["train"].texts + cut["validation"].texts) == sorted(whole["train"].texts)


def test_a_row_without_room_for_text_is_refused(labeled, tokenizers):
    with pytest.raises(UserError, match="max_length 2 has no room"):
        read(Path(labeled["classes"], "train.jsonl"), tokenizers, max_length=2)


def test_whole_numbers_and_bools_are_classes_and_fractions_numbers(tokenizers, tmp_path):
    for labels, names in (([10, 2], ["2", "10"]), ([True, False], ["False", "True"]), ([1.5, 2], [])):
        path = tmp_path / "labels.jsonl"
        path.write_text("\n".join(json.dumps({"text": "the", "label": label}) for label in labels))
        assert read(path, tokenizers)[0].names == names


# --- Order and loss ---------------------------------------------------------------------------------------------------


def test_batches_of_one_length_see_every_row_once_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    examples = [{"row": i} for i in range(1000)]
    rows = LengthGroupedRows(examples, lengths, 2500, seed=3, batch_size=16)
    order = rows.order()
    assert sorted(order[:1000]) == sorted(order[1000:2000]) == list(range(1000)) and len(order) == 2500
    assert order[:1000].tolist() != order[1000:2000].tolist()
    assert [row["row"] for row in rows.__getitems__(list(range(995, 1005)))] == order[995:1005].tolist()
    assert (LengthGroupedRows(examples, lengths, 2500, 3, 16).order() == order).all()
    assert (LengthGroupedRows(examples, lengths, 2500, 4, 16).order() != order).any()

    def padding(order) -> float:  # with all batches on the grid of the global batch, over the ends of epochs too
        batches = lengths[order[:2496]].reshape(-1, 16)
        return 1 - batches.sum() / (batches.max(axis=1) * 16).sum()

    plain = np.concatenate([np.random.default_rng(i).permutation(1000) for i in range(3)])
    assert padding(order) < 0.05 < 0.4 < padding(plain)


def test_losses_have_known_answers():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert float(summed_loss(logits, torch.tensor([0, 1]))) == pytest.approx(2 * np.log(2))
    assert float(summed_loss(logits[None], torch.tensor([[0, IGNORE_INDEX]]))) == pytest.approx(np.log(2))
    assert float(summed_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0]))) == pytest.approx(5.0)


def test_the_collator_pads_to_a_multiple_of_8_within_the_positions():
    rows = [{"input_ids": np.arange(n), "type_ids": np.zeros(n), "labels": 1} for n in (3, 9)]
    batch = DataCollatorForClassification(pad_token_id=5, max_length=12, type_ids=False)(rows)
    assert batch["input_ids"].shape == (2, 12) and set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"][0, 3:].unique().tolist() == [5] and batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(("kind", "model_type"), [("classes", "bert"), ("numbers", "llama"), ("tags", "modernbert")])
def test_accumulation_and_batch_size_of_evaluation_change_nothing(kind, model_type, arguments):
    """The head of each of these divides by the wrong number, or none, where Trainer leaves its loss to the model."""
    whole, recipe, words = arguments(kind, model_type)
    run_recipe(recipe, words)
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    pieces, recipe, words = arguments(kind, model_type, "pieces", **options)
    run_recipe(recipe, words)
    first, second = weights(whole), weights(pieces)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-4), name
    same(figures(whole), figures(pieces), tolerance=1e-4)
    norms = [
        [
            entry[key]
            for entry in json.loads((folder / "history.json").read_text())
            if "grad_norm" in entry
            for key in ("loss", "grad_norm")
        ]
        for folder in (whole, pieces)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "zero2"])
def test_two_processes_are_one(how, arguments, tmp_path):
    runs = {
        (kind, model): arguments(
            kind, model, f"{kind}-two", per_device_train_batch_size=2, per_device_eval_batch_size=4
        )
        for kind, model in (("classes", "bert"), ("numbers", "llama"), ("tags", "bert"))
    }
    jobs = tmp_path / "runs.json"
    jobs.write_text(json.dumps([[recipe, words] for _, recipe, words in runs.values()]))
    launch(how, str(jobs))
    for (kind, model), (two, *_) in runs.items():
        one, recipe, words = arguments(kind, model, f"{kind}-one")
        run_recipe(recipe, words)
        first, second = weights(one), weights(two)
        for name in first:
            assert torch.allclose(first[name], second[name], atol=1e-4), (kind, name)
        same(figures(one), figures(two), tolerance=1e-4)


# --- Models -----------------------------------------------------------------------------------------------------------


def backbone(folder: str, is_causal: bool | None, labeled, tokenizers, objective: str, auto_class=None):
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(tokenizers[objective])
    sources = parse_sources(f"{labeled['classes']}/train.jsonl", "train_data")
    task, splits, _ = read_task(sources, sources, [], ["text"], "label", False, tokenizer, 32)
    args = SimpleNamespace(model_name_or_path=folder, adapter="none", attn_implementation="sdpa")
    torch.manual_seed(0)
    model, heads = load_with_new_head(
        auto_class or AutoModelForSequenceClassification, args, task, tokenizer, is_causal
    )
    return model.eval(), heads, splits["train"], tokenizer


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_is_causal_opens_and_closes_a_causal_backbone(model_type, checkpoints, labeled, tokenizers):
    states = {}
    for is_causal in (None, True, False):
        model, *_ = backbone(checkpoints(model_type), is_causal, labeled, tokenizers, "clm")
        ids = torch.tensor([[20, 21, 22, 23], [20, 21, 22, 24]])
        states[is_causal] = model.base_model(input_ids=ids)[0]
        assert check_direction(model, is_causal).startswith("bidirectional") is (is_causal is False)
    moved = {key: bool((value[0, :3] - value[1, :3]).abs().max() > 1e-6) for key, value in states.items()}
    assert moved == {None: False, True: False, False: True}
    assert torch.equal(states[None], states[True])


def test_a_backbone_that_ignores_is_causal_is_refused(checkpoints, labeled, tokenizers):
    model, *_ = backbone(checkpoints("bert"), None, labeled, tokenizers, "mlm")
    with pytest.raises(UserError, match="does not honour is_causal: true"):
        check_direction(model, True)


@pytest.mark.parametrize("model_type", list(KINDS))
def test_scores_do_not_depend_on_padding(model_type, checkpoints, labeled, tokenizers):
    """The last token is not a pad, GPT-2 is given no token types, T5 finds its one end token."""
    objective = KINDS[model_type][0]
    model, _, split, tokenizer = backbone(checkpoints(model_type), None, labeled, tokenizers, objective)
    collator = DataCollatorForClassification(tokenizer.pad_token_id, 128, model_type == "bert")
    short = min(split.rows, key=lambda row: len(row["input_ids"]))
    long = max(split.rows, key=lambda row: len(row["input_ids"]))
    alone, batched = collator([short]), collator([short, long])
    assert alone["input_ids"].shape[1] < batched["input_ids"].shape[1]
    with torch.no_grad():
        logits = [model(**{k: v for k, v in b.items() if k != "labels"}).logits[0] for b in (alone, batched)]
    assert torch.allclose(*logits, atol=1e-6)


def test_a_head_that_transformers_lacks_is_one_sentence(checkpoints, labeled, tokenizers):
    from transformers import AutoModelForMultipleChoice

    with pytest.raises(UserError, match="no model for MultipleChoice of model_type llama"):
        backbone(checkpoints("llama"), None, labeled, tokenizers, "clm", AutoModelForMultipleChoice)


def run_card(folder: Path, text: str | None = None) -> str:
    """What the first example of the card prints, for another text."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    if text:
        code = re.sub(r'classify\(".*"\)', f"classify({text!r})", code)
    printed: list[str] = []
    code = code.replace(f'"{folder.name}"', repr(str(folder)))
    exec(code, {"print": lambda *words: printed.append(" ".join(map(str, words)))})
    return "\n".join(printed)


@pytest.mark.parametrize(("kind", "model_type"), [("classes", "t5"), ("tags", "llama")])
def test_a_finished_run_is_used_as_its_card_says(kind, model_type, arguments):
    folder, recipe, words = arguments(kind, model_type, is_causal="false" if model_type == "llama" else "null")
    run_recipe(
        recipe,
        [word for key, value in zip(words[::2], words[1::2], strict=True) for word in (key, value) if value != "null"],
    )
    found = figures(folder)
    assert found["eval_loss"] < found["eval_loss_before"]
    assert {"confusion.png", "loss.png", "samples.md", "lineage.json"} <= set(os.listdir(folder))
    assert "| precision | recall | F1 | support |" in (folder / "samples.md").read_text()
    printed = run_card(folder)
    if kind == "classes":
        assert "early" in printed or "late" in printed
    config = AutoConfig.from_pretrained(folder)
    assert set(config.label2id) == ({"early", "late"} if kind == "classes" else {"B-LOC", "O"})


def test_an_adapter_comes_back_with_its_head(arguments, labeled):
    from transformers import AutoModelForSequenceClassification

    from unlabeled.models.exports import load_and_check_export

    folder, recipe, words = arguments("classes", "llama", adapter="lora", is_causal="false", train_examples=160)
    run_recipe(recipe, words)
    found = figures(folder)
    assert found["eval_loss"] < found["eval_loss_before"]
    model = load_and_check_export(AutoModelForSequenceClassification, str(folder))
    assert model.get_base_model().config.is_causal is False
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()  # as a pipeline does
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(labeled["classes"], "test.jsonl").read_text().splitlines()]
    nats = 0.0
    for row in rows:
        inputs = {k: v for k, v in tokenizer(row["text"], return_tensors="pt").items() if k != "token_type_ids"}
        with torch.no_grad():
            first, second = model(**inputs).logits, stock(**inputs).logits
        assert torch.allclose(first, second, atol=1e-6)
        nats += float(summed_loss(first, torch.tensor([["early", "late"].index(row["label"])])))
    assert nats / len(rows) == pytest.approx(found["test_loss"], abs=1e-5)
    score = first.softmax(-1).max()  # of the last text: the pipeline of the card has the adapter too
    printed = run_card(folder, rows[-1]["text"])
    assert float(re.search(r"0\.\d+", printed)[0]) == pytest.approx(float(score), abs=1e-5)


def test_early_stopping_keeps_the_best(arguments):
    """A learning rate that destroys the model: what is left is the best evaluation, not the last."""
    options = {"early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
               "save_steps": 1, "save_total_limit": 1, "train_examples": 160}  # fmt: skip
    folder, recipe, words = arguments("numbers", "bert", learning_rate=0.02, **options)
    run_recipe(recipe, words)
    found = figures(folder)
    history = [e for e in json.loads((folder / "history.json").read_text()) if "eval_spearmanr" in e and e["step"]]
    scores = [entry["eval_spearmanr"] for entry in history][: found["steps"]]
    assert found["steps"] == min(20, int(np.argmax(scores)) + 1 + 2)
    assert found["eval_spearmanr"] == pytest.approx(max(scores), abs=1e-6)
    best = folder / f"checkpoint-{int(np.argmax(scores)) + 1}"
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(best)[name])


def test_early_stopping_resumes(arguments, tmp_path):
    """The patience that is used up, and which checkpoint is the best, are part of a checkpoint."""
    options = {"early_stopping_patience": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
               "save_steps": 1, "train_examples": 160}  # fmt: skip
    folder, recipe, words = arguments("classes", "bert", learning_rate=0.02, **options)
    with recorded_batches(tmp_path / "batches-of-whole"):
        run_recipe(recipe, words)
    whole, found = weights(folder), figures(folder)
    assert 4 <= found["steps"] < 20  # it did stop
    for name in ("metrics.json", "model.safetensors"):
        (folder / name).unlink()
    for checkpoint in find_checkpoints(str(folder))[:2]:  # as if the run had been killed two steps before
        shutil.rmtree(checkpoint)
    with recorded_batches(tmp_path / "batches-of-rest"):
        run_recipe(recipe, words)
    assert figures(folder)["steps"] == found["steps"]
    assert_same_order(tmp_path / "batches-of-whole", tmp_path / "batches-of-rest", first=found["steps"] - 1)
    same(found, figures(folder), tolerance=0)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, whole[name])
    # Killed after the last step, and moved: the best checkpoint is found by its step.
    assert str(folder) not in Path(find_checkpoints(str(folder))[0], "trainer_state.json").read_text()
    moved = folder.rename(folder.with_name("moved"))
    for name in ("metrics.json", "model.safetensors"):
        (moved / name).unlink()
    run_recipe(recipe, [str(moved) if word == str(folder) else word for word in words])
    for name, tensor in weights(moved).items():
        assert torch.equal(tensor, whole[name])
    assert figures(moved)["steps"] == found["steps"]
    same(found, figures(moved), tolerance=0)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def metric(name: str):
    import evaluate

    return evaluate.load(str(METRICS / f"{name}.py"), keep_in_memory=True, experiment_id=str(os.getpid()))


def test_metrics_have_known_answers():
    perfect = metric("classification").compute(predictions=[0, 1, 2, 1], references=[0, 1, 2, 1])
    assert perfect == pytest.approx({"accuracy": 1.0, "macro_f1": 1.0, "matthews_correlation": 1.0})
    half = metric("classification").compute(predictions=[0, 0, 0, 0], references=[0, 0, 1, 1])
    assert half == pytest.approx({"accuracy": 0.5, "macro_f1": 1 / 3, "matthews_correlation": 0.0})
    numbers = metric("regression").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.0, 3.0])
    assert numbers["spearmanr"] == pytest.approx(1.0) and numbers["mse"] == pytest.approx(1 / 3)
    constant = metric("regression").compute(predictions=[1.0, 1.0], references=[1.0, 2.0])
    assert (constant["spearmanr"], constant["pearsonr"]) == (0.0, 0.0)
    truth = [["O", "B-PER", "I-PER", "O"], ["B-LOC", "B-PER"]]
    found = [["O", "B-PER", "O", "O"], ["B-LOC", "B-PER"]]  # one entity of three is cut short
    entities = metric("entities").compute(predictions=found, references=truth)
    assert [entities[key] for key in ("precision", "recall", "f1")] == pytest.approx([2 / 3] * 3)
    assert entities["kinds"]["PER"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2})
    assert metric("entities").compute(predictions=truth, references=truth)["f1"] == 1.0
    nothing = metric("entities").compute(predictions=[["O"]], references=[["O"]])
    assert nothing["f1"] == 0.0
