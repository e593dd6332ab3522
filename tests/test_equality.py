"""One batch is one batch: however it is accumulated, spread over processes or sharded, the run is the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CAUSAL,
    MODELS,
    ROOT,
    SPAN_MODELS,
    free_ports,
    history,
    launch_environment,
    make_text,
    recipe_arguments,
    run_recipe,
    weights,
)

from unlabeled.data.collators import DataCollatorForSpanCorruption, MaskedCollator
from unlabeled.data.preparing import load_prepared
from unlabeled.data.randomness import EVALUATION_SEED

STEPS, ROWS = 4, 8
LENGTH = {"clm": 64, "mlm": 48, "span": 48}  # half of the documents or more fill a row alone, and not quite
SHARDED = {"zero1": 1, "zero2": 2, "zero3": 3}
LAUNCHED = ("llama", "gpt2", "bert", "modernbert", "t5")
LOSS, WEIGHT = 1e-5, 2e-5  # relative for losses and gradient norms, absolute for weights, which move by 0.01 and more


def objective_of(model_type: str) -> str:
    return "clm" if model_type in CAUSAL else "span" if model_type in SPAN_MODELS else "mlm"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> dict[str, str]:
    """Long documents that fill half a row or more, and short ones for some of the rest: rows with unequal targets."""
    folder = tmp_path_factory.mktemp("uneven")
    for split, long, short in (("train", 150, 60), ("validation", 20, 8)):
        texts = make_text(long, 2, 17, 25) + make_text(short, 3, 3, 7)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}


@pytest.fixture(scope="module")
def arguments(uneven, tokenizers, tmp_path_factory):
    """Makes (output_dir, arguments) of a run: four steps of eight rows, gradients that are clipped.

    Adam divides each gradient by its own size. With the default epsilon of 1e-8, rounding (about 1e-9) decides about
    weights whose gradients are nearly zero, and the largest difference depends on the processor.
    """

    def make(model_type: str, **options) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp(model_type) / "run"
        objective = objective_of(model_type)
        batch_tokens = ROWS * LENGTH[objective]
        options = {
            "max_length": LENGTH[objective], "train_tokens": STEPS * batch_tokens, "batch_tokens": batch_tokens,
            "per_device_train_batch_size": ROWS, "learning_rate": 0.01, "max_grad_norm": 0.5,
            "adam_epsilon": 1e-5,
        } | options  # fmt: skip
        return folder, recipe_arguments(objective, model_type, uneven, tokenizers, folder, **options)

    return make


@pytest.fixture(scope="module")
def single(arguments):
    """The folder of the run on one process in one piece, made when it is first asked for."""
    folders = {}

    def run(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type], words = arguments(model_type)
            run_recipe(f"pretrain_{objective_of(model_type)}", words)
        return folders[model_type]

    return run


@pytest.fixture(scope="module", params=["ddp", *SHARDED])
def launched(request, arguments, single, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    """(kind, folder of each model): two processes that accumulate twice, for all models in one launch."""
    pieces = {"per_device_train_batch_size": 2}
    runs = {model_type: arguments(model_type, **pieces) for model_type in LAUNCHED}
    if request.param == "zero3":  # a model that is read rather than drawn is sharded in another way
        runs["continued"] = continued(*arguments("llama", **pieces), single("llama"))
    recipes = {name: f"pretrain_{objective_of('llama' if name == 'continued' else name)}" for name in runs}
    todo = [(recipes[name], words) for name, (_, words) in runs.items()]
    path = tmp_path_factory.mktemp(request.param) / "runs.json"
    path.write_text(json.dumps(todo), encoding="utf-8")
    launch(request.param, str(path))
    return request.param, {name: folder for name, (folder, _) in runs.items()}


def continued(folder: Path, words: list[str], parent: Path) -> tuple[Path, list[str]]:
    """(output_dir, arguments) of a run that starts from `parent` instead of a model from scratch."""
    pairs = dict(zip(words[::2], words[1::2], strict=True)) | {"--model_name_or_path": str(parent)}
    scratch = ("--model_type", "--config_overrides")
    return folder, [word for key, value in pairs.items() if key not in scratch for word in (key, value)]


def launch(kind: str, runs: str) -> None:
    """Two processes on the CPU, as a user would start them: accelerate with a file of ds_configs/."""
    (port,) = free_ports(1)
    if kind != "ddp":
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its collectives for the CPU, and there is no g++")
    command = ["accelerate.commands.launch", "--config_file", f"ds_configs/{kind}.yaml"]
    command += ["--num_processes", "2", "--main_process_port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(ROOT / "tests" / "equality_worker.py"), runs],
        capture_output=True, text=True, cwd=ROOT, env=launch_environment(), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def assert_same_run(folder: Path, other: Path) -> None:
    """The loss and the gradient norm of each step, the held-out loss and all weights."""
    logs = [[entry for entry in history(run) if "loss" in entry] for run in (folder, other)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]] == list(range(1, STEPS + 1))
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=LOSS), one["step"]
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=LOSS), one["step"]
    evaluated = [read(run, "metrics.json")["eval_loss"] for run in (folder, other)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=LOSS)
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype == torch.float32
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=WEIGHT, msg=name)


def prepared(folder: Path, data: dict[str, str]):
    """The rows and the manifest that a run on this data was trained on."""
    lineage = read(folder, "lineage.json")
    objective, fingerprint = lineage["configuration"]["objective"], lineage["data"]["fingerprint"]
    return load_prepared(str(Path(data["train"]).parent / "prepared" / f"{objective}-{fingerprint[:16]}"))


@pytest.mark.parametrize("model_type", [*MODELS, "t5"])
def test_accumulation_is_no_matter(model_type, single, arguments):
    folder, words = arguments(model_type, per_device_train_batch_size=1, per_device_eval_batch_size=3)
    run_recipe(f"pretrain_{objective_of(model_type)}", words)
    assert read(folder, "lineage.json")["configuration"]["gradient_accumulation_steps"] == ROWS
    assert_same_run(single(model_type), folder)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5"])
def test_the_rows_of_these_tests_have_unequal_targets_and_padding(model_type, single, uneven):
    """Or a mean of means would pass for the mean."""
    rows, _ = prepared(single(model_type), uneven)
    used = np.array([len(row["input_ids"]) for row in rows["train"]])
    documents = np.array([len(row["lengths"]) for row in rows["train"]])
    assert (used < LENGTH[objective_of(model_type)]).mean() > 0.5
    assert used.max() > 1.3 * used.min()
    assert documents.max() > 1
    losses = [entry["loss"] for entry in history(single(model_type)) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05  # there is something to compare


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LAUNCHED)
def test_two_processes_and_shards_are_no_matter(launched, model_type, single):
    """DDP = ZeRO-1 = ZeRO-2 = ZeRO-3 = one process, from the same draw of the weights on."""
    kind, folders = launched
    plan = read(folders[model_type], "lineage.json")["plan"]
    assert plan["world_size"] == 2, "each process trained alone"
    assert plan["zero_stage"] == SHARDED.get(kind, 0)
    assert read(single(model_type), "lineage.json")["plan"]["world_size"] == 1
    assert_same_run(single(model_type), folders[model_type])


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["zero3"], indirect=True)
def test_a_continued_model_is_sharded_whole(launched, single, arguments):
    folder, words = continued(*arguments("llama"), single("llama"))
    run_recipe("pretrain_clm", words)
    assert_same_run(folder, launched[1]["continued"])


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["zero3"], indirect=True)
@pytest.mark.parametrize("model_type", LAUNCHED)
def test_what_shards_leave_behind_is_whole(launched, model_type, uneven):
    """The saved model reloads with every key and gives the loss that it reports, computed here without the package."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

    folder, objective = launched[1][model_type], objective_of(model_type)
    auto_class = {"clm": AutoModelForCausalLM, "mlm": AutoModelForMaskedLM, "span": AutoModelForSeq2SeqLM}[objective]
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, _ = prepared(folder, uneven)
    compute = {"clm": causal_loss, "mlm": masked_loss, "span": span_loss}[objective]
    with torch.no_grad():
        loss = compute(model.eval(), tokenizer, rows["validation"])
    assert read(folder, "metrics.json")["eval_loss"] == pytest.approx(loss, rel=LOSS)


def causal_loss(model, tokenizer, rows) -> float:
    """Nats per target, each document in a forward pass of its own."""
    nats, targets = 0.0, 0
    for row in rows:
        for ids in np.split(row["input_ids"].astype(np.int64), np.cumsum(row["lengths"])[:-1]):
            ids = torch.from_numpy(ids)
            log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
            nats -= log_probabilities[:-1].gather(-1, ids[1:, None]).sum().item()
            targets += len(ids) - 1
    return nats / targets


def masked_loss(model, tokenizer, rows) -> float:
    """Nats per target, each document in a forward pass of its own; only the masks themselves are the package's."""
    collator = MaskedCollator(tokenizer, mlm_probability=0.15, seed=EVALUATION_SEED)
    nats, targets = 0.0, 0
    for index, row in enumerate(rows):
        masked, places = collator.mask(row | {"epoch": 0, "row": index})
        end = 0
        for length in row["lengths"]:
            start, end = end, end + length
            mine = places[(places >= start) & (places < end)]
            log_probabilities = model(torch.from_numpy(masked[start:end])[None]).logits[0].double().log_softmax(-1)
            nats -= log_probabilities[mine - start, row["input_ids"][mine].astype(np.int64)].sum().item()
            targets += len(mine)
    return nats / targets


def span_loss(model, tokenizer, rows) -> float:
    """Nats per target, each document in a forward pass of its own without masks; only the spans are the package's."""
    collator = DataCollatorForSpanCorruption(tokenizer, max_length=LENGTH["span"], seed=EVALUATION_SEED)
    nats, targets = 0.0, 0
    for index, row in enumerate(rows):
        for ids, labels in collator.pairs(row | {"epoch": 0, "row": index}):
            nats += model(torch.from_numpy(ids)[None], labels=torch.from_numpy(labels)[None]).loss.item() * len(labels)
            targets += len(labels)
    return nats / targets
