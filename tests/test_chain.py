"""Chains of stages: what is run, what is skipped, and that a kill at any moment does not change the result."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import MODELS, ROOT

from unlabeled.chain import plan as chain_plan
from unlabeled.chain.commands import command_words, stage_files, stage_options
from unlabeled.chain.contents import digest
from unlabeled.chain.plan import Chain
from unlabeled.chain.recipe_keys import recipe_keys
from unlabeled.config.stages import argument_fields
from unlabeled.hub.push_record import record_push

CHAINS = sorted((ROOT / "recipes" / "chains").glob("*.yaml"))
# Stand-ins for the scripts, which are quick and work on a folder whose model is a few bytes.
MERGE = '''"""python scripts/merge_adapter.py"""
import argparse, hashlib, json, os, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--output_dir")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
model = pathlib.Path(args.folder, "model.safetensors").read_bytes()
out = pathlib.Path(args.output_dir)
out.mkdir(parents=True)  # fails if the folder exists: these stages do not resume
(out / "half").write_text("")
time.sleep(float(os.environ.get("STUB_SLEEP", 0)))
(out / "model.safetensors").write_bytes(hashlib.sha256(model + bytes([args.seed])).digest())
(out / "metrics.json").write_text(json.dumps({"bits_per_byte_before": 3.0, "bits_per_byte": 2.5, "train_tokens": 1234}))
print("\\r".join(["", "bar 1", "bar 2", "bar 3"]))
print(os.environ["PYTHONUNBUFFERED"], "ran merge")
'''
EVALUATE = '''"""python scripts/evaluate_model.py"""
import argparse, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--output_dir")
parser.add_argument("--data")
parser.add_argument("--sleep", type=float, default=0)
parser.add_argument("--fail", choices=["user", "crash", "stop", "stop launched"])
args = parser.parse_args()
out = pathlib.Path(args.output_dir)
out.mkdir(parents=True, exist_ok=True)
if args.fail:
    print("about to fail")
    faults = {
        "user": ("error: the data are bad; mend them", 2),
        "crash": ("ZeroDivisionError", 7),
        "stop": ("stopped: SIGTERM ended the run", 75),
        "stop launched": ("stopped: SIGTERM ended the run", 1),  # as under `accelerate launch`
    }
    message, status = faults[args.fail]
    print(message, file=sys.stderr)
    sys.exit(status)
child = subprocess.Popen(["sleep", str(args.sleep)])  # a grandchild, as under `accelerate launch`
(out / "pid").write_text(str(child.pid))
child.wait()
(out / "figures.json").write_text("{}")
'''
PUSH = '''"""python scripts/push_to_hub.py"""
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--repo-id")
parser.add_argument("--public", action="store_true")
args = parser.parse_args()
print("pushed", args.folder, args.repo_id, args.public)
'''
SLOW_PUSH = """
import os, pathlib, time
pathlib.Path("out/pushing").write_text("")
time.sleep(float(os.environ.get("SLOW", 0)))
"""
REPORT = '''"""python scripts/make_report.py"""
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
chain = json.loads((out / "chain.json").read_text())
folders = [out / stage["folder"] for stage in chain["stages"] if (out / stage["folder"]).is_dir()]
(folders[-1] / "report.html").write_text(json.dumps(chain))
with open(out / "reports", "a") as handle:
    handle.write("report\\n")
'''
STUBS = {"merge_adapter": MERGE, "evaluate_model": EVALUATE, "push_to_hub": PUSH, "make_report": REPORT}


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with the recipes, data scripts and accelerate files, and stand-ins for the other scripts."""
    (tmp_path / "scripts").mkdir()
    for name in ("recipes", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("run_chain", "train_tokenizer", "prepare_data"):
        shutil.copy(ROOT / "scripts" / f"{name}.py", tmp_path / "scripts")
    for name, text in STUBS.items():
        (tmp_path / "scripts" / f"{name}.py").write_text(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def write(repository: Path, stages: list, **more) -> None:
    content = {"output_dir": "out", "prompts": ["Who?"], "stages": stages} | more
    (repository / "test.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "scripts/run_chain.py", "test.yaml", *arguments]


def run(repository: Path, *arguments: str, status: int = 0, **environment: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command(*arguments), cwd=repository, capture_output=True, text=True, env=environment)
    assert done.returncode == status, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout + done.stderr


def start(repository: Path, **environment: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command(), cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(process: subprocess.Popen, pattern: str, folder: Path, delay: float = 0.0) -> Path:
    """The first path that matches, `delay` seconds after it appears."""
    while not (found := next(folder.glob(pattern), None)):
        assert process.poll() is None, f"ended before {pattern} was there: {process.stderr.read()[-3000:]}"
        time.sleep(0.002)
    time.sleep(delay)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants_of(pid: int, script: str) -> list[psutil.Process]:
    """The descendants of a process that run a script."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if script in process.cmdline()[:2]:
                found.append(process)
    return found


def record(repository: Path) -> dict:
    return json.loads((repository / "out" / "chain.json").read_text())


def states(repository: Path) -> list[str]:
    """The state of every stage, as the dry run prints it."""
    return [line.split(": ", 1)[1] for line in run(repository, "--dry-run").splitlines() if line.startswith("[")]


MERGES = [{"merge": {"folder": "model"}}, {"merge": {"name": "again", "seed": 1}}, {"evaluate": {}},
          {"push": {"repo_id": "me/it", "public": True}}]  # fmt: skip


def test_inputs_of_stages(repository):
    write(repository, MERGES)
    output = run(repository)
    first = hashlib.sha256(b"weights\0").digest()
    assert (repository / "out/2-again/model.safetensors").read_bytes() == hashlib.sha256(first + b"\1").digest()
    assert "pushed out/2-again me/it True" in output
    assert "[2/4] again: to do" in output and "1 ran merge" in output
    chain = record(repository)
    assert chain["name"] == "test" and chain["prompts"] == ["Who?"]
    assert [(entry["name"], entry["kind"], entry["folder"]) for entry in chain["stages"]] == [
        ("merge", "merge", "1-merge"),
        ("again", "merge", "2-again"),
        ("evaluate", "evaluate", "3-evaluate"),
        ("push", "push", "2-again"),
    ]
    assert all(entry["seconds"] >= 0 and entry["fingerprint"] and entry["command"] for entry in chain["stages"])
    assert "1,234  bits per byte 3.0000 -> 2.5000" in output
    assert "report: out/2-again/report.html" in output
    log = (repository / "out/logs/1-merge.log").read_text()
    assert log.startswith("$ ") and "bar 3\n1 ran merge\n" in log and "bar 1" not in log


def test_second_run(repository):
    write(repository, MERGES)
    run(repository)
    before = {path: path.stat().st_mtime_ns for path in (repository / "out").rglob("model.safetensors")}
    started = time.monotonic()
    output = run(repository)
    assert time.monotonic() - started < 20
    assert "nothing to do" in output and output.count("done already") == 5 and "ran merge" not in output
    assert {path: path.stat().st_mtime_ns for path in (repository / "out").rglob("model.safetensors")} == before
    assert (repository / "out/reports").read_text() == "report\n"
    assert states(repository) == ["done"] * 4
    (repository / "out/2-again/report.html").unlink()
    run(repository)
    write(repository, MERGES, prompts=["Whence?"])
    run(repository)
    assert (repository / "out/reports").read_text() == "report\n" * 3, "for a lost report and for other prompts"


def test_changed_stage(repository):
    write(repository, MERGES)
    run(repository)
    old = (repository / "out/2-again/model.safetensors").read_bytes()
    write(repository, [MERGES[0], {"merge": {"name": "again", "seed": 2}}, *MERGES[2:]])
    assert states(repository) == ["done", "changed (seed 1 -> 2)", "to do (after again)", "to do (after again)"]
    output = run(repository)
    assert "out/2-again is kept as out/2-again.old-1" in output and "out/3-evaluate is kept as" in output
    assert (repository / "out/2-again.old-1/model.safetensors").read_bytes() == old
    assert (repository / "out/2-again/model.safetensors").read_bytes() != old
    assert "pushed" in output and output.count("done already") == 1
    (repository / "model/model.safetensors").write_bytes(b"others!")  # as many bytes
    assert states(repository)[0] == "changed (folder has other content)"
    assert "done already" not in run(repository)
    shutil.rmtree(repository / "out/2-again")
    assert states(repository)[:2] == ["done", "to do"]
    assert run(repository).count("done already") == 3, "the same weights came out, so what reads them is still right"


@pytest.mark.parametrize("key", ["train_data", "eval_data", "test_data"])
def test_changed_data(repository, corpus, key):
    """Data count by their content, although these keys are free to change when a recipe is resumed."""
    data = repository / "data.jsonl"
    paths = dict.fromkeys(("train_data", "eval_data", "test_data"), corpus["train"]) | {key: str(data)}
    found = []
    here = os.getcwd()
    try:
        os.chdir(repository)
        for text in ("one", "other"):
            data.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
            stage = {"config": "recipes/configs/tiny/classify.yaml", "model_name_or_path": "model", **paths}
            write(repository, [{"classify": stage}])
            chain = Chain("test.yaml")
            chain.examine(chain.stages[0], {})
            found.append(digest(chain.stages[0].parts))
    finally:
        os.chdir(here)
    assert found[0] != found[1]


def test_keys_without_effect(repository, corpus):
    """Keys that are free to change when a recipe is resumed do not change a stage."""
    stage = {"config": "recipes/configs/tiny/pretrain_clm.yaml", "tokenizer_name_or_path": "model",
             "train_data": corpus["train"], "eval_data": corpus["validation"]}  # fmt: skip

    def fingerprint(**more) -> str:
        write(repository, [{"pretrain_clm": stage | more}])
        os.chdir(repository)
        chain = Chain("test.yaml")
        chain.examine(chain.stages[0], {})
        return digest(chain.stages[0].parts)

    before, here = fingerprint(), os.getcwd()
    try:
        assert fingerprint(logging_steps=3, save_steps=7, prepared_dir="elsewhere", report_to="none") == before
        assert fingerprint(learning_rate=0.5) != before
        moved = shutil.copy(corpus["train"], repository / "moved.jsonl")
        assert fingerprint(train_data=str(moved)) == before, "content counts, not its place"
        Path(moved).write_text('{"text": "other"}\n')
        assert fingerprint(train_data=str(moved)) != before
    finally:
        os.chdir(here)


def test_inserted_stage(repository):
    write(repository, MERGES[:2])
    run(repository)
    write(repository, [MERGES[0], {"evaluate": {}}, MERGES[1], {"evaluate": {"name": "last"}}])
    assert states(repository) == ["done", "to do", "done", "to do"]
    run(repository)
    names = {path.name for path in (repository / "out").iterdir() if path.is_dir()}
    assert names == {"1-merge", "2-again", "2-evaluate", "4-last", "logs"}


@pytest.mark.parametrize(("how", "status"), [("user", 2), ("crash", 1), ("stop", 75), ("stop launched", 75)])
def test_failing_stage(repository, how, status):
    write(repository, [MERGES[0], {"evaluate": {"fail": how}}, *MERGES[1:2]])
    output = run(repository, status=status)
    assert "2-evaluate failed" in output and output.count("about to fail") == 2, "as it happens and in the end"
    assert "scripts/evaluate_model.py out/1-merge --fail" in output.split("run it alone with")[1]
    assert not (repository / "out/3-again").exists() and not (repository / "out/reports").exists()
    assert states(repository)[:2] == ["done", "interrupted"]
    write(repository, [MERGES[0], {"evaluate": {}}, *MERGES[1:2]])
    assert "done already" in run(repository)
    assert not list((repository / "out").glob("*.old-*")), "nothing was trained in the folder that failed"


def test_stage_without_result(repository):
    (repository / "scripts/merge_adapter.py").write_text(MERGE.replace('"model.safetensors").write', '"other").write'))
    write(repository, MERGES[:1])
    assert "it has left no *.safetensors" in run(repository, status=1)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_stopped_chain(repository, how):
    write(repository, [{"evaluate": {"folder": "model", "sleep": 300}}])
    process = start(repository)
    pid = int(wait_for(process, "out/1-evaluate/pid", repository, 0.2).read_text())
    assert alive(pid)
    process.send_signal(how)
    process.wait(timeout=20)
    assert process.returncode == (-how if how == signal.SIGKILL else 75)
    end = time.monotonic() + (10 if how == signal.SIGKILL else 0)
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)
    assert states(repository) == ["interrupted"]
    write(repository, [{"evaluate": {"folder": "model", "sleep": 0}}])
    assert "report:" in run(repository), "and nothing holds the folder"


def test_two_chains_in_one_folder(repository):
    write(repository, [{"evaluate": {"folder": "model", "sleep": 4}}])
    process = start(repository)
    wait_for(process, "out/1-evaluate/pid", repository)
    output = run(repository)
    assert "waiting for what still runs in out" in output and "done already" in output
    assert process.wait(timeout=20) == 0


def test_killed_merge(repository):
    write(repository, MERGES[:2])
    process = start(repository, STUB_SLEEP="300")
    wait_for(process, "out/1-merge/half", repository)
    process.kill()
    process.wait()
    run(repository)
    assert (repository / "out/1-merge/model.safetensors").read_bytes() == hashlib.sha256(b"weights\0").digest()
    # Killed between the end of a stage and its record.
    chain = record(repository)
    last = chain["stages"].pop()
    (repository / "out/chain.json").write_text(
        json.dumps(chain | {"started": {last["name"]: last | {"at": time.time()}}})
    )
    before = (repository / "out/2-again/model.safetensors").read_bytes()
    assert states(repository) == ["done", "interrupted"]
    run(repository)
    assert (repository / "out/2-again/model.safetensors").read_bytes() == before


BAD = {
    "unknown key 'stage'": ({"stage": []}, ["test.yaml: unknown 'stage'; did you mean 'stages'?"]),
    "unknown kind": ({"stages": [{"pretrain_clmm": {}}]}, ["stage 1: unknown 'pretrain_clmm'", "'pretrain_clm'"]),
    "unknown key of a recipe": (
        {"stages": [{"pretrain_clm": {"config": "recipes/configs/tiny/pretrain_clm.yaml", "learning_rat": 1}}]},
        ["stage 1: unknown 'learning_rat'; did you mean 'learning_rate'?"],
    ),
    "unknown key of a script": ({"stages": [{"tokenizer": {"vocab": 9}}]}, ["'vocab'", "'vocab_size'"]),
    "no stages": ({"stages": []}, ["test.yaml: no stages; list them"]),
    "no mapping": ({"stages": ["merge"]}, ["stage 1 is no `KIND"]),
    "first stage without a model": ({"stages": [{"merge": {}}]}, ["merge needs a model", "set folder"]),
    "scratch without a tokenizer": (
        {"stages": [{"pretrain_clm": {"model_type": "llama"}}]},
        ["pretrain_clm needs a tokenizer", "set tokenizer_name_or_path"],
    ),
    "accelerate": ({"stages": MERGES, "accelerate": "ds_configs/none.yaml"}, ["there is no ds_configs/none.yaml"]),
    "two of a name": ({"stages": [MERGES[0], {"merge": {}}]}, ["two stages are called merge", "`name`"]),
    "config": ({"stages": [{"pretrain_clm": {"config": "recipes/none.yaml"}}]}, ["cannot read recipes/none.yaml"]),
    "output_dir": ({"stages": [{"merge": {"output_dir": "x"}}]}, ["stage 1: remove output_dir"]),
    "no output_dir": ({"stages": MERGES, "output_dir": None}, ["set output_dir"]),
    "data": ({"stages": [*MERGES[:2], {"evaluate": {"data": "no/such.txt"}}]}, ["evaluate: data: no file matches"]),
    "model": ({"stages": [{"merge": {"folder": "no/such/one"}}]}, ["merge: folder: there is no folder no/such/one"]),
    "demo data": (
        {"stages": [{"merge": {"folder": "models/demo/minilm"}}, {"evaluate": {"data": "data/demo/bbc/*.parquet"}}]},
        ["needs models/demo/minilm, data/demo/bbc", "python scripts/get_demo_data.py minilm bbc`"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(repository, name):
    content, wanted = BAD[name]
    write(repository, content.pop("stages", []), **content)
    output = run(repository, status=2)
    assert output.startswith("error: ") and output.count("\n") == 1
    assert all(part in output for part in wanted), output
    assert not (repository / "out").exists()


def test_killed_push(repository):
    """A push is done only if it was completed."""
    (repository / "scripts" / "push_to_hub.py").write_text(PUSH + SLOW_PUSH)
    write(repository, MERGES)
    process = start(repository, SLOW="60")
    wait_for(process, "out/pushing", repository)
    process.kill()
    process.wait()
    assert states(repository)[3] == "to do"
    assert "pushed out/2-again me/it True" in run(repository)
    assert states(repository)[3] == "done"


def test_push_of_a_recipe(tmp_path, monkeypatch):
    """A stage with push_to_hub is done once it has been pushed; another hub_model_id is another push."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain_plan, "stage_options", lambda kinds: dict.fromkeys(kinds))  # it takes seconds
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    folder = tmp_path / "out" / "1-sft"
    folder.mkdir(parents=True)
    for name in ("metrics.json", "model.safetensors"):
        (folder / name).write_text("{}")

    def state(**keys) -> str:
        stage = {"model_name_or_path": "org/model", "push_to_hub": True} | keys
        Path("test.yaml").write_text(yaml.safe_dump({"output_dir": "out", "stages": [{"sft": stage}]}))
        parts = {"kind": "sft", "model_name_or_path": "org/model"}
        record = {"name": "sft", "kind": "sft", "folder": "1-sft", "parts": parts, "seconds": 1, "fingerprint": "f"}
        Path("out/chain.json").write_text(json.dumps({"name": "test", "stages": [record]}))
        chain = Chain("test.yaml")
        chain.examine(chain.stages[0], {})
        return chain.stages[0].state

    assert state(push_to_hub=False) == "done"
    assert state() == "interrupted"
    assert state(hub_model_id="me/it") == "interrupted"
    record_push(folder, "me/it", None, "an address")
    assert state(hub_model_id="me/it") == state(hub_model_id="it") == "done"
    assert state(hub_model_id="me/other") == "interrupted"
    assert state(hub_model_id="me/it", hub_revision="other") == "interrupted"
    record_push(folder, "me/1-sft", None, "an address")
    assert state() == "done"
    Path(folder, "pushed.json").write_text("[")
    assert state() == "interrupted"


def test_token_in_no_file(repository):
    token = "hf_PlantedTokenThatNobodyMaySee"
    script = repository / "scripts" / "push_to_hub.py"
    script.write_text(script.read_text() + "import os\nprint(len(os.environ['HF_TOKEN']))\n")
    write(repository, MERGES)
    output = run(repository, HF_TOKEN=token)
    assert f"\n{len(token)}\n" in output, "the stage has it"
    written = {path: path.read_bytes() for path in (repository / "out").rglob("*") if path.is_file()}
    assert {"chain.json", "4-push.log", "report.html"} <= {path.name for path in written}
    for where, data in (written | {"output": output.encode()}).items():
        assert token.encode() not in data, where


def test_folder_of_another_chain(repository):
    write(repository, MERGES[:1])
    run(repository)
    (repository / "test.yaml").rename(repository / "other.yaml")
    write(repository, MERGES[:1])
    (repository / "out/chain.json").write_text((repository / "out/chain.json").read_text().replace('"test"', '"other"'))
    assert "holds the chain 'other'; set it to another folder" in run(repository, status=2)
    (repository / "out/chain.json").write_text("{")
    assert "no readable chain.json" in run(repository, status=2)
    run(repository, "--output_dir", "out2")
    assert (repository / "out2/1-merge/model.safetensors").exists()


@pytest.mark.parametrize("kind", ["pretrain_clm", "pretrain_mlm", "prepare"])
def test_keys_of_recipes(kind, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipes = [kind] if kind != "prepare" else ["pretrain_clm", "pretrain_mlm", "pretrain_span"]
    expected = {key for recipe in recipes for key in argument_fields(recipe)} | {"env"}
    if kind == "prepare":
        expected.add("objective")
    assert stage_options([kind])[kind].keys() == expected


def test_keys_of_own_recipe(repository):
    """A recipe that a user has copied and changed is a kind of stage, with the keys of the classes that it defines."""
    (repository / "recipes").unlink()
    shutil.copytree(ROOT / "recipes", repository / "recipes")
    text = (ROOT / "recipes" / "sft.py").read_text(encoding="utf-8")
    own_class = "\n\n@dataclass\nclass RhymeArguments:\n    rhyme: str = 'couplet'\n\n\nif __name__"
    text = text.replace("\n\nif __name__", own_class)
    text = text.replace("from transformers import", "from dataclasses import dataclass\nfrom transformers import")
    (repository / "recipes" / "rhyme.py").write_text(text, encoding="utf-8")
    write(repository, [{"rhyme": {"model_name_or_path": "org/model", "rhyme": "sonnet", "learning_rate": 1e-3}}])
    assert "recipes/rhyme.py --rhyme sonnet" in run(repository, "--dry-run").replace(
        "--model_name_or_path org/model ", ""
    )
    write(repository, [{"rhyme": {"model_name_or_path": "org/model", "rime": "sonnet"}}])
    assert "unknown 'rime'; did you mean 'rhyme'?" in run(repository, "--dry-run", status=2)


def test_recipe_that_cannot_be_imported(tmp_path):
    """Its keys are not known; it says why when it runs."""
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    assert recipe_keys(str(tmp_path / "broken.py")) is None


def test_command_words():
    words = command_words
    assert words("--a", None, is_flag=False) == ["--a", "null"] and words("--a", True, is_flag=False) == ["--a", "true"]
    assert words("--a", True, is_flag=True) == ["--a"] and words("--a", False, is_flag=True) == []
    assert words("--a", {"b": 1}, is_flag=False) == ["--a", '{"b": 1}']
    assert words("--train_data", ["x", "y"], is_flag=False) == ["--train_data", '["x", "y"]']
    assert words("--report_to", ["x", "y"], is_flag=False) == ["--report_to", "x", "y"]


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_shipped_chains(path, tmp_path, monkeypatch):
    """Every stage has the inputs that it needs, and the first line names the hardware and the measured time."""
    monkeypatch.chdir(ROOT)
    chain = Chain(str(path), str(tmp_path / "out"))
    chain.connect_all()
    for stage in chain.stages:
        words = chain.command(stage)
        assert words[-1] and (ROOT / words[words.index(stage_files()[stage.kind])]).exists()
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert (
        first.startswith("# ") and ("CPU" in first or "GPU" in first) and ("not yet measured" in first or " s" in first)
    )
    assert chain.prompts
    output_dir = yaml.safe_load(path.read_text(encoding="utf-8"))["output_dir"]
    assert output_dir == f"outputs/chains/{path.stem}"


def real_stages(corpus) -> list:
    """A tokenizer, prepared text and pretraining of 12 steps, with a checkpoint every second step."""
    config = {
        "train_data": corpus["train"], "eval_data": corpus["validation"], "model_type": "llama",
        "config_overrides": MODELS["llama"], "max_length": 32, "train_tokens": 12 * 256, "batch_tokens": 256,
        "per_device_train_batch_size": 8, "precision": "fp32", "compile": False, "save_steps": 2, "use_cpu": True,
        "objective": "clm",
    }  # fmt: skip
    pretraining = {key: value for key, value in config.items() if key != "objective"}
    return [{"tokenizer": {"algorithm": "bpe", "vocab_size": 384, "data": corpus["train"]}}, {"prepare": config},
            {"pretrain_clm": pretraining}]  # fmt: skip


def tuning_stages(repository: Path) -> list:
    """An adapter, its merge, and preference tuning, each of 12 steps with a checkpoint every second step."""
    words = ["what", "who", "where", "when", "how", "why", "this", "that"]
    talks = [
        {"messages": [{"role": "user", "content": f"{a} {b}?"}, {"role": "assistant", "content": f"{b} {a}."}]}
        for a in words
        for b in words
    ]
    pairs = [{"prompt": f"{a} {b}?", "chosen": f"{b} {a}.", "rejected": f"{a} {a}"} for a in words for b in words]
    for name, rows in (("talks", talks), ("pairs", pairs)):
        (repository / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"chat_template": "recipes/templates/chatml.jinja", "max_length": 64, "per_device_train_batch_size": 4,
              "precision": "fp32", "save_steps": 2, "use_cpu": True, "eval_fraction": 0.2}  # fmt: skip
    sft = common | {"train_data": "talks.jsonl", "train_tokens": 12 * 256, "batch_tokens": 256, "adapter": "lora"}
    dpo = common | {"train_data": "pairs.jsonl", "train_pairs": 48, "batch_pairs": 4}
    return [{"sft": sft}, {"merge": {}}, {"dpo": dpo}]


@pytest.mark.slow
def test_killed_chain_ends_in_equal_weights(repository, corpus):
    for name in ("merge_adapter", "generate"):
        shutil.copy(ROOT / "scripts" / f"{name}.py", repository / "scripts")
    write(repository, real_stages(corpus) + tuning_stages(repository))
    run(repository, "--output_dir", "whole")
    moments = (
        ("out/logs/1-tokenizer.log", 0.5), ("out/1-tokenizer/tokenizer.json", 0), ("out/logs/2-prepare.log", 1),
        ("out/2-prepare/*", 0), ("out/3-pretrain_clm/checkpoint-4", 0.05), ("out/4-sft/checkpoint-4", 0.05),
        ("out/logs/5-merge.log", 1), ("out/6-dpo/checkpoint-4", 0.05),
    )  # fmt: skip
    for pattern, delay in moments:
        process = start(repository)
        wait_for(process, pattern, repository, delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    # Now the recipe is killed, and the chain reports it.
    process = start(repository)
    wait_for(process, "out/6-dpo/checkpoint-8", repository)
    assert record(repository)["started"]["dpo"]
    # The checkpoint may be that of the previous chain, whose recipe may still be ending.
    while not (recipes := descendants_of(process.pid, "recipes/dpo.py")):
        assert process.poll() is None
        time.sleep(0.01)
    for recipe in recipes:
        recipe.kill()
    assert process.wait(timeout=60) == 1
    assert not (repository / "out/6-dpo/metrics.json").exists(), "killed too late: the test would prove nothing"
    assert "resuming from out/6-dpo/checkpoint-" in run(repository)
    for name in (
        "1-tokenizer/tokenizer.json",
        "3-pretrain_clm/model.safetensors",
        "4-sft/adapter_model.safetensors",
        "5-merge/model.safetensors",
        "6-dpo/model.safetensors",
    ):
        assert (repository / "out" / name).read_bytes() == (repository / "whole" / name).read_bytes(), name
    assert not [path for path in (repository / "out").iterdir() if "incomplete" in path.name or "old" in path.name]
    # Killed between the end of the training and its record.
    chain = record(repository)
    last = next(entry for entry in chain["stages"] if entry["name"] == "dpo")
    chain["stages"].remove(last)
    chain["started"] = {"dpo": last | {"at": time.time()}}
    (repository / "out/chain.json").write_text(json.dumps(chain))
    before = (repository / "out/6-dpo/model.safetensors").stat().st_mtime_ns
    assert run(repository).count("done already") == 5
    assert (repository / "out/6-dpo/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_bad_input_of_a_recipe(repository, corpus, tokenizers):
    stage = real_stages(corpus)[2]["pretrain_clm"] | {
        "learning_rate": -1.0,
        "tokenizer_name_or_path": tokenizers["clm"],
    }
    write(repository, [{"pretrain_clm": stage}])
    output = run(repository, status=2)
    assert "error: learning_rate is -1.0; set it to at least 0" in output and "Traceback" not in output
