"""`scripts/plan.py`: budgets, recommendations, messages, and the YAML file that it writes."""

import json
import re
import resource
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_recipe

from unlabeled.planner.text import measure_text
from unlabeled.planning import count_parameters
from unlabeled.planning.recommendations import (
    HOURS_BETWEEN_FAILURES,
    recommend_batch,
    recommend_checkpoint_interval,
    recommend_learning_rate,
    recommend_shape,
)
from unlabeled.planning.scaling_laws import BESIROGLU, HOFFMANN, approach_1, effective_tokens
from unlabeled.planning.shapes import count_shape


def run(*words) -> None:
    """Run the script with these options."""
    before, sys.argv = sys.argv, ["scripts/plan.py", *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "scripts/plan.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture
def plan(capsys):
    """The plan of these options from the JSON of the script. The report has to come out as well."""

    def plan_options(*words) -> dict:
        capsys.readouterr()
        run(*words)
        assert "None" not in capsys.readouterr().out
        run(*words, "--json")
        return json.loads(capsys.readouterr().out)

    return plan_options


@pytest.fixture
def refused(capsys):
    def plan_options(*words) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run(*words)
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_info.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return plan_options


def test_imports_and_cpu_time():
    """A plan from a budget imports neither torch nor transformers. CPU time, because other jobs may run."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "; assert not {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, "scripts/plan.py", "--flops", "1e20", "--device", "H100"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.mark.parametrize("flops", [1e18, 1e20, 1e21, 5.76e23])
def test_compute_budget(plan, flops):
    planned = plan("--flops", flops)
    assert planned["flops"] == pytest.approx(flops, rel=0.02)
    n, d = BESIROGLU.optimum(6 * planned["model"]["total"] * planned["tokens"])
    assert planned["optima"]["besiroglu"] == pytest.approx([n, d])
    assert planned["model"]["total"] == pytest.approx(n, rel=0.35)  # attention makes a token more expensive than 6 N
    assert planned["share_of_flops_needed"] > 0.95
    assert plan("--flops", flops, "--law", "hoffmann")["tokens_per_parameter"] == pytest.approx(
        HOFFMANN.optimum(flops)[1] / HOFFMANN.optimum(flops)[0], rel=0.35
    )
    assert plan("--flops", flops, "--tokens_per_parameter", 20)["tokens_per_parameter"] == pytest.approx(20, rel=0.25)


def test_budget_of_hours_and_of_money(plan):
    hours = plan("--hours", 24, "--gpus", 8, "--device", "H100", "--usd_per_gpu_hour", 2.5)
    assert hours["time"]["seconds"] == pytest.approx(24 * 3600, rel=0.02)
    assert hours["time"]["usd"] == pytest.approx(24 * 8 * 2.5, rel=0.02)
    assert hours["flops"] == pytest.approx(24 * 3600 * 8 * 0.4 * 989.4e12, rel=0.02)
    money = plan("--price", 480, "--gpus", 8, "--device", "H100", "--usd_per_gpu_hour", 2.5)
    assert money == hours
    tokens = plan("--hours", 24, "--gpus", 8, "--device", "H100", "--tokens", 1e10)
    assert tokens["tokens"] == pytest.approx(1e10, rel=0.001)
    assert tokens["time"]["seconds"] == pytest.approx(24 * 3600, rel=0.05)


def test_far_from_the_optimum(plan, capsys):
    """GPT-3 was trained on 1.7 tokens per parameter; Llama 3's smallest on 1,875, to be cheap to use."""
    gpt3 = plan("--parameters", 175e9, "--tokens", 300e9, "--vocab_size", 50257)
    assert gpt3["model"]["num_hidden_layers"] == 96 and gpt3["model"]["hidden_size"] == 12288
    assert gpt3["tokens_per_parameter"] == pytest.approx(1.7, rel=0.02)
    assert gpt3["share_of_flops_needed"] < 0.65
    run("--parameters", 175e9, "--tokens", 300e9, "--vocab_size", 50257)
    assert "larger than the optimum: undertrained" in capsys.readouterr().out
    run("--parameters", 8e9, "--tokens", 15e12, "--vocab_size", 128256)
    assert "smaller than the optimum, and cheaper to use" in capsys.readouterr().out


def test_repeated_text(plan, corpus, tokenizers, tmp_path):
    size = sum(len(json.loads(line)["text"].encode()) for line in Path(corpus["train"]).read_text().splitlines())
    planned = plan("--data", corpus["train"], "--tokenizer", tokenizers["clm"], "--parameters", 60_000, "--tokens", 1e6)
    assert planned["text"]["bytes"] == pytest.approx(size, rel=0.02)
    assert planned["text"]["vocab_size"] == 384 and planned["model"]["vocab_size"] == 384
    assert planned["epochs"] == pytest.approx(1e6 / planned["text"]["tokens"], rel=0.01)
    assert planned["text"]["tokens"] < planned["effective_tokens"] < planned["tokens"]
    assert planned["loss_with_repetition"] > planned["loss"]
    (tmp_path / "large.txt").write_text("abcdefg " * 500_000, encoding="utf-8")
    alone = plan("--data", tmp_path / "large.txt", "--vocab_size", 100, "--max_length", 32)
    assert alone["tokens"] == pytest.approx(1e6, rel=0.001) and alone["epochs"] == pytest.approx(1, rel=0.001)
    assert alone["loss_with_repetition"] == pytest.approx(alone["loss"])


@pytest.mark.parametrize("name", [
    "text.txt", "text.MD", "text.csv", "text.tsv", "text.parquet", "text.jsonl", "text.ndjson.gz", "text.json",
    "text[1].txt", "folder/text.txt", "folder/text.csv.xz",
])  # fmt: skip
def test_measure_text(tmp_path, name):
    """Files are read as in training, hidden files left out."""
    import pandas

    texts = [f"line {number}, with a comma" for number in range(3000)]
    table = pandas.DataFrame({"number": range(3000), "text": texts})
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if ".csv" in name or ".tsv" in name:
        table.to_csv(file, index=False, sep="," if ".csv" in name else "\t")
    elif ".parquet" in name:
        table.to_parquet(file)
    elif "json" in name:
        table.to_json(file, orient="records", lines=not name.endswith(".json"))
    else:
        file.write_text("\n".join(texts), encoding="utf-8")
    (file.parent / ".hidden.txt").write_text("hidden " * 10_000)
    size = measure_text(str(file.parent if "folder" in name else file), None)
    assert size.bytes == pytest.approx(sum(map(len, texts)), rel=0.05)
    assert size.tokens == size.bytes / 4 and not size.measured


CONFIGS = [
    path
    for path in sorted((ROOT / "recipes/configs").glob("*/pretrain_*.yaml"))
    if "model_type:" in path.read_text(encoding="utf-8")  # not those that continue a model of the Hub
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_pretraining_configs(plan, path, tmp_path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    gpus, file = 4, path
    if path.parent.name == "tiny":  # a batch of few rows, which its own micro-batch does not divide
        config["per_device_train_batch_size"], gpus = 1, 8
        file = tmp_path / path.name
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
    planned = plan("--config", file, "--device", "H100", "--gpus", gpus)
    assert (planned["tokens"], planned["batch_tokens"]) == (config["train_tokens"], config["batch_tokens"])
    assert planned["model"]["model_type"] == config["model_type"]
    if path.parent.name == "tiny":  # limited by the optimizer, which reads and writes 28 bytes per parameter and step
        seconds = planned["steps"] * 28 * planned["model"]["total"] / 3350e9
    else:
        seconds = planned["flops"] / (gpus * 0.4 * 989.4e12)
    assert planned["time"]["seconds"] == pytest.approx(seconds)
    assert ("loss" in planned) == (path.stem == "pretrain_clm")  # the laws are of causal models
    assert planned["in_memory"]["per_device_train_batch_size"] == config["per_device_train_batch_size"]
    assert sum(planned["in_memory"]["memory"].values()) < 0.9 * 80e9


def test_written_config_runs(plan, corpus, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    file = tmp_path / "mine/pretrain_clm.yaml"
    words = ("--parameters", 60_000, "--tokens", 20_000, "--max_length", 32, "--data", corpus["train"])
    run(*words, "--tokenizer", tokenizers["clm"], "--write", file)
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert config["train_tokens"] == pytest.approx(20_000, rel=0.1)
    output = str(tmp_path / "run")
    options = ["--output_dir", output, "--prepared_dir", str(tmp_path / "prepared"), "--use_cpu", "true"]
    run_recipe("pretrain_clm", ["--config", str(file), *options])
    metrics = json.loads(Path(output, "metrics.json").read_text(encoding="utf-8"))
    planned = plan(*words, "--tokenizer", tokenizers["clm"])
    assert metrics["parameters"] == pytest.approx(planned["model"]["total"], rel=0.01)  # a pad token more
    assert metrics["flops"] == pytest.approx(planned["flops"], rel=0.01)
    assert metrics["expected_flops"] == metrics["flops"]
    # The run is then what the next plan rests on.
    again = plan("--hours", 1, "--measured", output, "--vocab_size", 384, "--max_length", 32)
    assert again["time"]["flops_per_second"] == pytest.approx(metrics["flops_per_second"], rel=0.01)
    assert again["time"]["seconds"] == pytest.approx(3600, rel=0.05)


def test_figure_and_law_file(plan, tmp_path):
    (tmp_path / "law.json").write_text(json.dumps(asdict(HOFFMANN)), encoding="utf-8")
    planned = plan("--flops", 1e20, "--law", tmp_path / "law.json", "--figure", tmp_path / "budget.png")
    assert planned["law"]["beta"] == 0.28
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_fitted_law(plan, tmp_path):
    for number, (n, d) in enumerate((n, d) for n in (1e6, 4e6, 16e6) for d in (2e7, 1e8, 5e8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        metrics = {"parameters": n, "train_tokens": d, "eval_loss": BESIROGLU.loss(n, d)}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    planned = plan("--parameters", 1e7, "--fit", *sorted(tmp_path.iterdir()), "--vocab_size", 4096)
    assert planned["law"]["alpha"] == pytest.approx(BESIROGLU.alpha, rel=0.02)
    assert set(planned["intervals"]) == {"A", "B", "E", "alpha", "beta"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name where to start from: one of --flops, --hours"),
        (("--flops", 1e20, "--hours", 3, "--device", "H100"), "--flops and --hours are two budgets; give one of them"),
        (("--flops", 1e20, "--parameters", 1e8, "--tokens", 1e9), "already make a budget; leave out --flops"),
        (("--hours", 3), "add --device, or --measured"),
        (("--price", 3, "--device", "H100"), "--price buys hours at --usd_per_gpu_hour"),
        (("--flops", -1), "--flops is -1; it must be above 0"),
        (("--flops", 1e20, "--mfu", 40), "--mfu 40 is more than the peak of the device"),
        (("--flops", 1e20, "--device", "H1000"), "device 'H1000' is not in the table of H200, H100"),
        (("--flops", 1e20, "--device", "T4"), "--device T4 has no unit for bf16; set --precision fp32"),
        (("--flops", 1e12), "hold no model with a vocabulary of 32,768"),
        (("--parameters", 1e13, "--device", "T4", "--precision", "fp32"), "a micro-batch of 1 takes"),
        (("--flops", 1e20, "--law", "kaplan"), "kaplan is no scaling law"),
        (("--flops", 1e20, "--measured", "nowhere"), "--measured nowhere is not the folder of a finished run"),
        (("--data", "nowhere.txt"), "--data: no file matches nowhere.txt; check the path"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml cannot be read"),
        (("--config", "recipes/configs/llama-1b/sft.yaml"), "there is no folder outputs/llama-1b/pretrain_clm on this"),
        (("--config", "recipes/chains/tiny.yaml"), "tiny.yaml: name its recipe with --recipe, one of pretrain_clm, "),
        (("--config", "recipes/chains/tiny.yaml", "--recipe", "dpo"), "has no train_pairs and batch_pairs, which dpo"),
        (("--config", "recipes/configs/tiny/pretrain_clm.yaml", "--flops", 1), "leave out --flops, or change the YAML"),
        (("--config", "recipes/configs/tiny/pretrain_clm.yaml", "--tokens", 1), "has a budget in tokens; leave out"),
        (
            ("--config", "recipes/configs/tiny/pretrain_clm.yaml", "--gpus", 3),
            "does not divide into rows of max_length",
        ),
        (("--hours", 1, "--device", "cpu"), "the table of peaks has no CPU; give --measured"),
        (("--flops", 1e20, "--write", "x.yaml"), "--write needs --data and --tokenizer"),
    ],
)
def test_refused_options(refused, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    assert message in refused(*words)


def test_recommendations_of_published_models():
    """DeepSeek LLM's own settings: 7 B on 2T tokens with 9.4 M tokens a step at 4.2e-4, 67 B with 18.9 M at 3.2e-4."""
    for flops, batch, rate in ((8e22, 9.4e6, 4.2e-4), (8e23, 18.9e6, 3.2e-4)):
        assert recommend_batch(flops, 4096, 2e12) == pytest.approx(batch, rel=0.15)
        assert recommend_learning_rate(flops) == pytest.approx(rate, rel=0.05)
    for parameters, vocabulary, layers, width in (
        (124e6, 50257, 12, 768),
        (13e9, 32000, 40, 5120),
        (175e9, 50257, 96, 12288),
    ):
        shape = recommend_shape(parameters, vocabulary, 2048)
        assert (shape.num_hidden_layers, shape.hidden_size) == (layers, width)
    # Llama 3: an interruption every three hours on 16,384 GPUs.
    hours = HOURS_BETWEEN_FAILURES / 16_384
    assert hours == pytest.approx(3.1, rel=0.01)
    assert recommend_checkpoint_interval(60, 16_384) == pytest.approx((2 * 60 * 3.093 * 3600) ** 0.5, rel=0.01)


@pytest.mark.parametrize("parameters", [3e5, 1.1e6, 5e6, 3e7, 3.5e8, 1e9, 7e9, 7e10, 1e12])
def test_recommended_shapes(parameters):
    from test_budget import on_meta
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = recommend_shape(parameters, 1024 if parameters < 1e6 else 2048 if parameters < 1e7 else 32000, 1024)
    counts = count_shape(shape)
    assert counts.total == pytest.approx(parameters, rel=0.07)
    assert shape.hidden_size % shape.num_attention_heads == 0
    sizes = {name: value for name, value in vars(shape).items() if name != "model_type" and value is not None}
    assert count_parameters(on_meta(AutoModelForCausalLM, LlamaConfig(**sizes))) == counts


def test_documented_numbers(plan, monkeypatch):
    """The commands of docs/planning.md run, and its table and text have their numbers."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    commands = [
        line.split()[2:] for line in page.splitlines() if line.startswith("python scripts/plan.py --parameters")
    ]
    text = " ".join(page.split())
    rows = [line for line in page.splitlines() if line.startswith(("| GPT-3", "| Llama 7B", "| Chinchilla"))]
    for words, row in zip(commands, rows, strict=True):
        planned = plan(*words)
        ratio = planned["tokens_per_parameter"]
        assert f"| {ratio:.{0 if ratio > 10 else 1}f} | {planned['loss']:.3f} |" in row
        assert f"{planned['share_of_flops_needed']:.0%}".replace("%", " %") in row or "as many" in row
    # The numbers of its text, of which the laws are functions.
    for words, law in (("give 23 tokens", BESIROGLU), ("approach 3 give 40", HOFFMANN)):
        n, d = law.optimum(1e20)
        assert words in text and f"{d / n:.0f}" in words
    n, d = approach_1(1e20)
    assert "approach 1 gives 20" in text and round(d / n) == 20
    assert "attention is a seventh of the FLOPs of a model with 870M parameters" in text
    planned = plan("--flops", 1e20)
    assert round(planned["model"]["total"] / 1e6) == 870 and round(1 / planned["attention_share"]) == 7
    assert "four epochs are worth 93 % of as many fresh tokens, and forty epochs are worth 15" in text
    assert f"{effective_tokens(4, 1) / 4:.0%} {effective_tokens(40, 1):.0f}" == "93% 15"


def test_documented_plan(capsys, monkeypatch):
    """The example of docs/planning.md is what its command prints."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    command, printed = re.search(r"For example, `python (.*?)` prints:\n\n```text\n(.*?)```", page, re.S).groups()
    run(*command.split()[1:])
    assert capsys.readouterr().out == printed
