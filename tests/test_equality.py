"""A run does not depend on how its batches are accumulated, spread over processes or sharded."""

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

from unlabeled.data.collators import DataCollatorForPackedLanguageModeling, DataCollatorForSpanCorruption
from unlabeled.data.preparing import load_prepared
from unlabeled.data.randomness import EVALUATION_SEED

STEPS = 4
ROWS = 8  # of a step
LENGTH = {"clm": 64, "mlm": 48, "span": 48}  # half of the documents or more almost fill a row of their own
SHARDED = {"zero1": 1, "zero2": 2, "zero3": 3}
LAUNCHED = ("llama", "gpt2", "bert", "modernbert", "t5")
LOSS = 1e-5  # relative tolerance of losses and gradient norms
WEIGHT = 2e-5  # absolute tolerance of weights, which change by 0.01 and more


def objective_of(model_type: str) -> str:
    if model_type in CAUSAL:
        return "clm"
    return "span" if model_type in SPAN_MODELS else "mlm"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> dict[str, str]:
    """Long documents that fill half a row or more, and some short ones: rows with unequal numbers of targets."""
    folder = tmp_path_factory.mktemp("uneven")
    for split, long, short in (("train", 150, 60), ("validation", 20, 8)):
        texts = make_text(long, 2, 17, 25) + make_text(short, 3, 3, 7)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}


@pytest.fixture(scope="module")
def arguments(uneven, tokenizers, tmp_path_factory):
    """Returns (output_dir, arguments) of a run: four steps of eight rows with clipped gradients.

    Adam divides each gradient by its own size. With the default epsilon of 1e-8, rounding errors of about 1e-9 would
    decide about weights whose gradients are nearly zero, and the result would depend on the processor.
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
    """Returns the output folder of a run on one process without accumulation, which runs at the first call."""
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
    options = {"per_device_train_batch_size": 2}
    runs = {model_type: arguments(model_type, **options) for model_type in LAUNCHED}
    if request.param == "zero3":  # loaded weights are sharded in another way than initial ones
        runs["continued"] = continued(*arguments("llama", **options), single("llama"))
    recipes = {name: f"pretrain_{objective_of('llama' if name == 'continued' else name)}" for name in runs}
    launches = [(recipes[name], words) for name, (_, words) in runs.items()]
    path = tmp_path_factory.mktemp(request.param) / "runs.json"
    path.write_text(json.dumps(launches), encoding="utf-8")
    launch(request.param, str(path))
    return request.param, {name: folder for name, (folder, _) in runs.items()}


def continued(folder: Path, words: list[str], parent: Path) -> tuple[Path, list[str]]:
    """(output_dir, arguments) of a run that starts from `parent` instead of a model from scratch."""
    pairs = dict(zip(words[::2], words[1::2], strict=True)) | {"--model_name_or_path": str(parent)}
    scratch = ("--model_type", "--config_overrides")
    return folder, [word for key, value in pairs.items() if key not in scratch for word in (key, value)]


def launch(kind: str, runs: str) -> None:
    """Launch two processes on the CPU as a user would: accelerate with a file of ds_configs/."""
    (port,) = free_ports(1)
    if kind != "ddp":
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its collectives for the CPU, and there is no g++")
    command = ["accelerate.commands.launch", "--config_file", f"ds_configs/{kind}.yaml"]
    command += ["--num_processes", "2", "--main_process_port", str(port)]
    worker = str(ROOT / "tests" / "equality_worker.py")
    result = subprocess.run(
        [sys.executable, "-m", *command, worker, runs],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=launch_environment(),
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-5000:]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def assert_same_run(folder: Path, other: Path) -> None:
    """Compare the loss and the gradient norm of each step, the held-out loss and all weights."""
    log = [entry for entry in history(folder) if "loss" in entry]
    other_log = [entry for entry in history(other) if "loss" in entry]
    assert [entry["step"] for entry in log] == [entry["step"] for entry in other_log] == list(range(1, STEPS + 1))
    for entry, other_entry in zip(log, other_log, strict=True):
        assert other_entry["loss"] == pytest.approx(entry["loss"], rel=LOSS), entry["step"]
        assert other_entry["grad_norm"] == pytest.approx(entry["grad_norm"], rel=LOSS), entry["step"]
    eval_loss = read(folder, "metrics.json")["eval_loss"]
    assert read(other, "metrics.json")["eval_loss"] == pytest.approx(eval_loss, rel=LOSS)
    expected = weights(folder)
    other_weights = weights(other)
    assert other_weights.keys() == expected.keys()
    for name, tensor in other_weights.items():
        assert tensor.dtype == expected[name].dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=WEIGHT, msg=name)


def prepared(folder: Path, data: dict[str, str]):
    """The rows and the manifest that a run on this data was trained with."""
    lineage = read(folder, "lineage.json")
    objective, fingerprint = lineage["configuration"]["objective"], lineage["data"]["fingerprint"]
    return load_prepared(str(Path(data["train"]).parent / "prepared" / f"{objective}-{fingerprint[:16]}"))


@pytest.mark.parametrize("model_type", [*MODELS, "t5"])
def test_gradient_accumulation(model_type, single, arguments):
    folder, words = arguments(model_type, per_device_train_batch_size=1, per_device_eval_batch_size=3)
    run_recipe(f"pretrain_{objective_of(model_type)}", words)
    assert read(folder, "lineage.json")["configuration"]["gradient_accumulation_steps"] == ROWS
    assert_same_run(single(model_type), folder)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5"])
def test_uneven_rows(model_type, single, uneven):
    """The rows of these tests have unequal numbers of targets; otherwise a mean of means would equal the mean."""
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
def test_two_processes(launched, model_type, single):
    """DDP = ZeRO-1 = ZeRO-2 = ZeRO-3 = one process, from the initial weights on."""
    kind, folders = launched
    plan = read(folders[model_type], "lineage.json")["plan"]
    assert plan["world_size"] == 2, "each process trained alone"
    assert plan["zero_stage"] == SHARDED.get(kind, 0)
    assert read(single(model_type), "lineage.json")["plan"]["world_size"] == 1
    assert_same_run(single(model_type), folders[model_type])


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["zero3"], indirect=True)
def test_zero3_continued_model(launched, single, arguments):
    folder, words = continued(*arguments("llama"), single("llama"))
    run_recipe("pretrain_clm", words)
    assert_same_run(folder, launched[1]["continued"])


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["zero3"], indirect=True)
@pytest.mark.parametrize("model_type", LAUNCHED)
def test_zero3_saved_model(launched, model_type, uneven):
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
    """Nats per target, each document in a forward pass of its own. Only the choice of the masks uses the package."""
    collator = DataCollatorForPackedLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15, seed=EVALUATION_SEED)
    nats, targets = 0.0, 0
    for index, row in enumerate(rows):
        masked, positions = collator.mask(row | {"epoch": 0, "row": index})
        end = 0
        for length in row["lengths"]:
            start, end = end, end + length
            targets_here = positions[(positions >= start) & (positions < end)]
            log_probabilities = model(torch.from_numpy(masked[start:end])[None]).logits[0].double().log_softmax(-1)
            nats -= (
                log_probabilities[targets_here - start, row["input_ids"][targets_here].astype(np.int64)].sum().item()
            )
            targets += len(targets_here)
    return nats / targets


def span_loss(model, tokenizer, rows) -> float:
    """Nats per target, each document in a forward pass of its own. Only the choice of the spans uses the package."""
    collator = DataCollatorForSpanCorruption(tokenizer, max_length=LENGTH["span"], seed=EVALUATION_SEED)
    nats, targets = 0.0, 0
    for index, row in enumerate(rows):
        for ids, labels in collator.corrupt_documents(row | {"epoch": 0, "row": index}):
            nats += model(torch.from_numpy(ids)[None], labels=torch.from_numpy(labels)[None]).loss.item() * len(labels)
            targets += len(labels)
    return nats / targets
