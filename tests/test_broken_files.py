"""Folders of finished runs with one file damaged: each reader succeeds or says in one sentence what is wrong."""

import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conftest import ROOT, recipe_arguments, run_recipe

from unlabeled import UserError
from unlabeled.chain.processes import run_command
from unlabeled.chain.runner import exit_after_failure

SECONDS = 20  # for a reader, which takes less than one

# --- Damages ---------------------------------------------------------------------------------------------------------


def other_type(value):
    """A value of another type than this one."""
    if isinstance(value, str):
        return ["a", "list"]
    return "a text" if isinstance(value, int | float | bool | type(None)) else 5


def damages(content: bytes, is_json: bool, every_key: bool) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of each damage; content None stands for a pipe.

    Args:
        every_key: damage each key of the outermost object, too, and each number in it.
    """
    yield "pipe", None
    yield "empty", b""
    yield "cut", content[: len(content) // 2]
    yield "random", bytes(range(255, 0, -1)) * 4
    if not is_json:
        return
    for name, text in {"list": "[]", "object": "{}", "null": "null", "text": '"a"', "deep": "[" * 100_000}.items():
        yield name, text.encode()
    value = json.loads(content)
    if not every_key or not isinstance(value, dict):
        return
    for key in value:
        yield f"{key} of another type", json.dumps(value | {key: other_type(value[key])}).encode()
        yield f"{key} null", json.dumps(value | {key: None}).encode()
        for number in (10**9, -5) if isinstance(value[key], int | float) and not isinstance(value[key], bool) else ():
            yield f"{key} {number}", json.dumps(value | {key: number}).encode()


@contextmanager
def damaged(path: Path, content: bytes | None) -> Iterator[None]:
    before = path.read_bytes()
    path.unlink()
    try:
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
        yield
    finally:
        path.unlink()
        path.write_bytes(before)


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number, frame) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_script(name: str, *arguments) -> None:
    """Call the `main` of a script in this process."""
    main = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        main()


def outcome(read: Callable[[], object]) -> str | None:
    """What is wrong with how a reader took a damage; None where it succeeded or refused it in a sentence."""
    try:
        with time_limit():
            read()
    except UserError as error:
        return f"more than a sentence: {error}" if "\n" in str(error) else None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


# --- Folders and their readers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(corpus, tokenizers, tmp_path_factory) -> dict[str, Path]:
    """Finished runs: a model, an adapter on it, and a chain of them."""
    root = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
        run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, root / "1-model"))
        rows = root / "conversations.jsonl"
        messages = [{"role": "user", "content": "the of"}, {"role": "assistant", "content": "and to a in"}]
        rows.write_text((json.dumps({"messages": messages}) + "\n") * 30)
        options = {
            "model_name_or_path": root / "1-model", "train_data": rows, "eval_data": rows, "adapter": "lora",
            "lora_r": 2, "max_length": 64, "train_tokens": 256, "batch_tokens": 128, "precision": "fp32",
            "per_device_train_batch_size": 2, "use_cpu": "true", "compile": "false", "output_dir": root / "2-adapter",
            "prepared_dir": root / "prepared", "chat_template": ROOT / "recipes/templates/chatml.jinja",
        }  # fmt: skip
        run_recipe("sft", [word for key, value in options.items() for word in (f"--{key}", str(value))])
    stages = [
        {"name": name, "kind": kind, "folder": folder, "seconds": 1.0, "fingerprint": "sha256:0", "parts": {}}
        for name, kind, folder in (("model", "pretrain_clm", "1-model"), ("adapter", "sft", "2-adapter"))
    ]
    chain = {"name": "tiny", "prompts": [], "stages": stages, "started": {}}
    (root / "chain.json").write_text(json.dumps(chain))
    for folder in root.glob("*-*/checkpoint-*"):
        shutil.rmtree(folder)
    return {"model": root / "1-model", "adapter": root / "2-adapter", "chain": root}


def read_model(folder: Path) -> None:
    """As a recipe begins that trains on it."""
    from unlabeled.data.tokenization import load_tokenizer
    from unlabeled.models.tuning import load_for_tuning
    from unlabeled.reporting.lineage import parent_of

    load_tokenizer(str(folder), "model_name_or_path")
    arguments = {"adapter": "none", "model_name_or_path": str(folder), "attn_implementation": "sdpa"}
    load_for_tuning(SimpleNamespace(**arguments), quiet=True)
    parent_of(str(folder))


def generate(folder: Path) -> None:
    run_script("generate", folder, "the of", "--max_new_tokens", 2)


def evaluate(folder: Path, corpus) -> None:
    run_script("evaluate_model", folder, "--data", corpus["validation"], "--max_length", 32)


def push(folder: Path) -> None:
    run_script("push_to_hub", folder, "--repo-id", "someone/something", "--dry-run")


def merge(folder: Path, tmp_path: Path) -> None:
    run_script("merge_adapter", folder, "--output_dir", tmp_path / "merged")
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)


def plan(folder: Path) -> None:
    run_script("plan", "--measured", folder, "--parameters", "1e6", "--tokens", "1e6")


def report(folder: Path) -> None:
    run_script("make_report", folder.parent)


def readers_of(kind: str, file: str, corpus, tmp_path: Path) -> dict[str, Callable[[Path], None]]:
    """The commands that read a file of a folder."""
    records = {"lineage.json", "metrics.json", "history.json"}
    readers: dict[str, Callable] = {}
    if file in records:
        readers["report"] = report
    if kind == "model" and file in ("lineage.json", "metrics.json"):
        readers["plan"] = plan
    if file not in records - {"lineage.json"}:
        readers |= {"recipe": read_model, "generate": generate}
    if kind == "model":
        readers |= {"push": push} | ({} if file in records else {"evaluate": lambda folder: evaluate(folder, corpus)})
    else:
        readers["merge"] = lambda folder: merge(folder, tmp_path)
    return readers


def failures(folder: Path, file: str, readers: dict[str, Callable[[Path], None]], every_key: bool) -> list[str]:
    """Damages and readers that do not get along."""
    found = []
    path = folder / file
    content = path.read_bytes()
    for name, damage in damages(content, file.endswith(".json"), every_key):
        with damaged(path, damage):
            for reader, read in readers.items():
                fault = outcome(lambda read=read: read(folder))
                if fault:
                    found.append(f"{reader}, {file} {name}: {fault}")
    assert path.read_bytes() == content
    return found


# What is read of a folder. One in each kind of damage is tried in every run of the tests, all of them in the slow one.
FILES = [
    ("model", "config.json"), ("model", "generation_config.json"), ("model", "tokenizer.json"),
    ("model", "tokenizer_config.json"), ("model", "model.safetensors"), ("model", "lineage.json"),
    ("model", "metrics.json"), ("model", "history.json"), ("adapter", "adapter_config.json"),
    ("adapter", "adapter_model.safetensors"), ("adapter", "chat_template.jinja"), ("adapter", "tokenizer_config.json"),
    ("adapter", "lineage.json"), ("adapter", "config.json"), ("adapter", "model.safetensors.index.json"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file"), FILES, ids=lambda value: value)
def test_damaged_file(kind, file, folders, corpus, tmp_path, capfd):
    """A pipe, half of the file, nothing, random bytes, other JSON: each command says so, or needs nothing of it."""
    readers = readers_of(kind, file, corpus, tmp_path)
    readers.pop("evaluate", None)  # reads what `generate` reads
    assert failures(folders[kind], file, readers, every_key=False) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file"), FILES, ids=lambda value: value)
def test_damaged_keys(kind, file, folders, corpus, tmp_path, capfd):
    """Each key of a file null, of another type, and each number 1e9 or negative."""
    assert failures(folders[kind], file, readers_of(kind, file, corpus, tmp_path), every_key=True) == []


def test_refused_damage(folders):
    """What the damages of a model have to be refused for: `test_damaged_file` also lets readers succeed."""
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        for name, damage in damages((folders["model"] / file).read_bytes(), False, False):
            with damaged(folders["model"] / file, damage), pytest.raises(UserError, match="model_name_or_path"):
                read_model(folders["model"])
            assert name


NUMBERS = {
    "config.json": {"vocab_size": 10**9, "num_hidden_layers": 10**9, "hidden_size": 10**9, "pad_token_id": -5},
    "generation_config.json": {"eos_token_id": 10**9, "pad_token_id": [1, 10**9], "bos_token_id": "one"},
    "adapter_config.json": {
        "r": 10**9, "peft_type": "NEW", "task_type": "PAINT", "base_model_name_or_path": 5,
        "alora_invocation_tokens": "one",
    },
    "model.safetensors.index.json": {"weight_map": {"a": "../model.safetensors"}},
    "tokenizer_config.json": {"model_max_length": "long"},
    "lineage.json": {"plan": None, "parent": 5, "stage": 3},
}  # fmt: skip


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in NUMBERS.items() for key in keys])
def test_impossible_value(file, key, folders):
    """Refused before anything is built or allocated from it, with the name of the file and of the key."""
    folder = folders["adapter" if file.startswith(("adapter", "model.s")) else "model"]
    path = folder / file
    values = json.loads(path.read_text()) | {key: NUMBERS[file][key]}
    with damaged(path, json.dumps(values).encode()), pytest.raises(UserError) as error, time_limit():
        read_model(folder)
    assert file in str(error.value) and (key in str(error.value) or key == "weight_map")


def test_huge_token_id(folders):
    """Its vector would need a table of a billion rows."""
    path = folders["model"] / "tokenizer.json"
    content = json.loads(path.read_text())
    token = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][token] = 10**9
    with damaged(path, json.dumps(content).encode()), pytest.raises(UserError, match="1,000,000,000"):
        read_model(folders["model"])


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"])
def test_huge_overrides(key, corpus, tokenizers, tmp_path):
    sizes = json.dumps({"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4} | {key: 10**9})
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", config_overrides=sizes)
    with pytest.raises(UserError, match=f"config_overrides: {key} is 1,000,000,000"), time_limit():
        run_recipe("pretrain_clm", arguments)


# --- Chains, and small files in general ------------------------------------------------------------------------------


def chain_of(folders, tmp_path: Path) -> Path:
    yaml = tmp_path / "tiny.yaml"
    stages = [{"merge": {"folder": str(folders["adapter"])}}]
    yaml.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "stages": stages, "prompts": []}))
    return yaml


def dry_run(yaml: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    run_script("run_chain", yaml, "--dry-run")


def test_damaged_records_of_a_chain(folders, tmp_path, monkeypatch, capfd):
    yaml = chain_of(folders, tmp_path)
    entry = {"name": "merge", "kind": "merge", "folder": "1-merge", "seconds": 1.0, "fingerprint": "a", "parts": {}}
    state = {"name": "tiny", "prompts": [], "stages": [entry], "started": {"other": entry | {"at": 1.0}}}
    (tmp_path / "out" / "logs").mkdir(parents=True)
    chain, hashes = tmp_path / "out" / "chain.json", tmp_path / "out" / "logs" / "hashes.json"
    chain.write_text(json.dumps(state))
    hashes.write_text(json.dumps({"file": [1, 2, "sha256"]}))
    readers = {"chain": lambda folder: dry_run(yaml, monkeypatch)}
    assert failures(tmp_path / "out", "chain.json", readers, every_key=True) == []
    assert failures(tmp_path / "out" / "logs", "hashes.json", readers, every_key=True) == []
    for key in entry:
        chain.write_text(json.dumps(state | {"stages": [entry | {key: None}]}))
        with pytest.raises(UserError, match=r"chain\.json is damaged"):
            dry_run(yaml, monkeypatch)


def test_damaged_chain(folders, tmp_path, monkeypatch, capfd):
    yaml = chain_of(folders, tmp_path)
    for name, damage in damages(yaml.read_bytes(), True, True):
        with damaged(yaml, damage):
            assert outcome(lambda: dry_run(yaml, monkeypatch)) is None, name


@pytest.mark.parametrize("reader", ["parse", "plan"])
def test_damaged_configuration(reader, tmp_path, capfd):
    from unlabeled.config import DataArguments, ModelArguments, PretrainingArguments, parse_arguments

    yaml = tmp_path / "pretrain_clm.yaml"
    shutil.copy(ROOT / "recipes/configs/tiny/pretrain_clm.yaml", yaml)
    if reader == "parse":
        words = ["--config", str(yaml), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
        read = lambda: parse_arguments(ModelArguments, DataArguments, PretrainingArguments, args=words)  # noqa: E731
    else:
        read = lambda: run_script("plan", "--config", yaml)  # noqa: E731
    content = yaml.read_bytes()
    import yaml as library

    values = library.safe_load(content)
    cases = dict(damages(content, False, False)) | dict(damages(json.dumps(values).encode(), True, True))
    for name, damage in cases.items():
        with damaged(yaml, damage):
            assert outcome(read) is None, name


def test_numbers_in_a_plan(tmp_path, capsys):
    """YAML takes 1e9 for a text."""
    yaml = tmp_path / "pretrain_clm.yaml"
    content = (ROOT / "recipes/configs/tiny/pretrain_clm.yaml").read_text()
    plans = []
    for tokens in ("819200", "8.192e5"):
        yaml.write_text(re.sub("train_tokens: .*", f"train_tokens: {tokens}", content))
        run_script("plan", "--config", yaml)
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


def test_small_files(tmp_path):
    """One function reads them: what is no file, or is huge, is an error with a reason."""
    from unlabeled.runtime import files as small_files

    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "directory")):
        with pytest.raises(OSError, match=reason), time_limit():
            small_files.read_small_file(path)
    large = tmp_path / "large"
    with open(large, "wb") as handle:
        handle.truncate(small_files.LIMIT_BYTES + 1)
    with pytest.raises(OSError, match="more than"):
        small_files.read_small_file(large)


def test_full_log_of_a_chain(folders, tmp_path, monkeypatch, capsys):
    """A stage ends as it would with a log, and what it printed last is still shown."""
    monkeypatch.chdir(ROOT)
    accelerate = "ds_configs/single.yaml"
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    for log in (Path("/dev/full"), tmp_path / "none" / "stage.log"):
        code = "print('one'); print('error: two'); raise SystemExit(2)"
        status, lines = run_command(accelerate, [sys.executable, "-c", code], log, lock)
        assert (status, lines) == (2, ["one", "error: two"])
        with pytest.raises(SystemExit) as stop:
            exit_after_failure("stage", ["command"], log, lines, status)
        assert stop.value.code == 2
        assert "error: two" in capsys.readouterr().err
    os.close(lock)


# --- Chat templates --------------------------------------------------------------------------------------------------

NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
ENDLESS = {
    "loop": (NESTED.replace("BODY", ""), "runs for more than 0.5 s"),
    "loop with output": (NESTED.replace("BODY", "a"), "runs for more than 0.5 s|of memory"),
    "large text": ("{{ 'a' * 90000000000 }}", "takes more than .* GB of memory"),
    "large text of a message": ("{{ messages[0]['content'] * 9000000000 }}", "takes more than .* GB of memory"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "cannot be rendered"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_chat_template(name, tokenizers, tmp_path, monkeypatch):
    import resource

    from unlabeled.data import rendering
    from unlabeled.data.chat_templates import set_chat_template
    from unlabeled.data.tokenization import load_tokenizer
    from unlabeled.models.generation import reply

    template, reason = ENDLESS[name]
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    tokenizer = load_tokenizer(tokenizers["clm"])
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(UserError, match=f"template.jinja ({reason})"), time_limit():
        set_chat_template(tokenizer, str(file))
    with pytest.raises(UserError, match=f"chat template of .* ({reason})"), time_limit():
        reply(None, tokenizer, "a question")
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before


def test_template_looping_on_one_conversation(tokenizers, tmp_path, monkeypatch):
    """It is stopped while data are prepared, too."""
    from unlabeled.data import rendering
    from unlabeled.data.chat_templates import set_chat_template
    from unlabeled.data.conversations import read_conversations
    from unlabeled.data.sources import Source
    from unlabeled.data.tokenization import load_tokenizer

    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    monkeypatch.setattr(rendering, "SECONDS_PER_CONVERSATION", 0.0)
    tokenizer = load_tokenizer(tokenizers["clm"])
    shipped = (ROOT / "recipes/templates/chatml.jinja").read_text()
    file = tmp_path / "template.jinja"
    file.write_text("{% if messages[0]['content'] == 'loop' %}" + NESTED.replace("BODY", "") + "{% endif %}" + shipped)
    set_chat_template(tokenizer, str(file))
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as handle:
        for content in ("fine", "loop"):
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
            handle.write(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=r"runs for more than 0\.3 s on 2 conversations"), time_limit():
        list(read_conversations(Source(str(rows)), tokenizer))


# --- Caches ----------------------------------------------------------------------------------------------------------


def test_unwritable_caches(tmp_path, monkeypatch, capsys):
    from unlabeled.runtime import caches

    good = tmp_path / "good" / "cache"
    below_a_file = tmp_path / "file"
    below_a_file.write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(below_a_file / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(good))
    caches.use_writable_caches()
    assert os.environ["TRITON_CACHE_DIR"] == str(good)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(tempfile.gettempdir())
    assert "cannot be written to" in capsys.readouterr().err
    monkeypatch.setattr(caches, "NEEDED_BYTES", 1 << 60)
    assert caches.find_write_problem(str(good)) == "is on a disk that is full"


def test_full_disk_in_a_library():
    from unlabeled.runtime import caches

    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/kernel.so")
        except OSError as error:
            raise RuntimeError("backend failed") from error

    sentence = r"cannot write /somewhere/kernel\.so \(No space left on device\); make room"
    with pytest.raises(UserError, match=sentence), caches.raise_for_full_disk(UserError):
        fail()
    with pytest.raises(RuntimeError, match="another"), caches.raise_for_full_disk(UserError):
        raise RuntimeError("another")


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["size=64k", "size=64k,ro"], ids=["full", "read-only"])
def test_caches_on_a_bad_disk(disk, corpus, tokenizers, tmp_path):
    """A run on local data needs none of the folders of its libraries."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", disk, "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    names = (
        "HF_HOME", "HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
    )  # fmt: skip
    try:
        if "ro" not in disk:
            with suppress(OSError), open(folder / "filler", "wb", buffering=0) as handle:
                while handle.write(bytes(4096)):
                    pass
        arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", compile="true")
        done = subprocess.run(
            [sys.executable, "recipes/pretrain_clm.py", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {name: str(folder / name) for name in names},
        )
    finally:
        subprocess.run(["umount", folder], check=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
