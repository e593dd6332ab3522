"""The files that a push sends for every recipe: without secrets, paths of the machine or user names."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conftest import ROOT, recipe_arguments, run_recipe
from hub_server import USER, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.errors import HTTPError
from test_finetuning import CHATML, make_conversations, make_pairs, phrase, write_lines
from test_secrets import KEYS

from unlabeled import UserError
from unlabeled.hub.client import check_token, create_repository
from unlabeled.hub.contents import check_secrets, find_pickles, find_push_contents, list_checkpoint_files
from unlabeled.hub.push import push, push_command
from unlabeled.hub.trainer_mixin import PushMixin
from unlabeled.reporting.lineage import list_stages, portable
from unlabeled.training.merging import merge_adapter

NAMES = ("clm", "mlm", "span", "sft", "lora", "own_base", "dpo", "classify", "tag", "embed", "merge")
ADAPTERS = ("lora", "own_base")  # not pushed, as their base is a local folder
USER_NAME = "planted-user-name"
COMMON = {
    "precision": "fp32", "logging_steps": 1, "use_cpu": "true", "save_steps": 1, "max_length": 64,
    "per_device_train_batch_size": 4,
}  # fmt: skip


def words_of(options: dict) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def commands() -> dict[str, tuple[str, list[str]]]:
    """{name: (recipe, its arguments)} of the runs of `folders`."""
    return {}


@pytest.fixture(scope="module")
def folders(tokenizers, commands, tmp_path_factory) -> dict[str, Path]:
    """{name: output_dir} of a run of two steps of every recipe, in the home folder of a user, by absolute paths."""
    home = tmp_path_factory.mktemp("home") / USER_NAME
    data = home / "data"
    data.mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 12)):
        draw = random.Random(count)
        write_lines(data / f"text_{split}.jsonl", [{"text": phrase(draw, 20)} for _ in range(2 * count)])
        write_lines(data / f"sft_{split}.jsonl", make_conversations(count, seed=count))
        write_lines(data / f"dpo_{split}.jsonl", make_pairs(count, seed=count))
        labels = [{"text": phrase(draw, 8), "label": ("early", "late")[i % 2]} for i in range(count)]
        write_lines(data / f"classify_{split}.jsonl", labels)
        tags = [{"tokens": phrase(draw, 4).split(), "ner_tags": ["B-LOC", "O", "O", "O"]} for _ in range(count)]
        write_lines(data / f"tag_{split}.jsonl", tags)
        pairs = {phrase(draw, 6): phrase(draw, 9) for _ in range(2 * count)}
        write_lines(data / f"embed_{split}.jsonl", [{"anchor": a, "positive": b} for a, b in pairs.items()][:count])
    runs = {name: home / "runs" / name for name in NAMES}
    text = {"train": str(data / "text_train.jsonl"), "validation": str(data / "text_validation.jsonl")}
    two_steps = {"train_tokens": 2 * 256, "save_steps": 1}
    for name, model_type in (("clm", "llama"), ("mlm", "bert"), ("span", "t5")):
        arguments = recipe_arguments(name, model_type, text, tokenizers, runs[name], **two_steps)
        commands[name] = (f"pretrain_{name}", arguments)
        run_recipe(*commands[name])
    tokens = {"train_tokens": 2 * 256, "batch_tokens": 256, "prepared_dir": data / "prepared", "compile": "false"}
    tokens |= {"chat_template": CHATML}
    lora = {"adapter": "lora", "lora_r": 2}
    examples = {"train_examples": 8, "batch_examples": 4}
    tag = {"text_column": "tokens", "label_column": "ner_tags"}
    stages = {
        "sft": ("sft", "clm", tokens),
        "lora": ("sft", "sft", tokens | lora),
        "own_base": ("sft", "clm", tokens | lora),  # the template brings new tokens, so the base is saved with it
        "dpo": ("dpo", "sft", {"train_pairs": 8, "batch_pairs": 4, "prepared_dir": data / "prepared"}),
        "classify": (
            "classify",
            "mlm",
            examples | {"early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 1},
        ),
        "tag": ("tag", "mlm", examples | tag),
        "embed": ("embed", "mlm", {"train_pairs": 8, "batch_pairs": 4}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
        for name, (recipe, parent, options) in stages.items():
            options = COMMON | {
                "model_name_or_path": runs[parent], "output_dir": runs[name],
                "train_data": data / f"{recipe}_train.jsonl", "eval_data": data / f"{recipe}_validation.jsonl",
            } | options  # fmt: skip
            commands[name] = (recipe, words_of(options))
            run_recipe(*commands[name])
        merge_adapter(runs["lora"], runs["merge"])
    return runs


def going_files(folder: Path) -> list[Path]:
    return [folder / path for path in find_push_contents(folder)[0]]


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of checkpoints that `hub_strategy: checkpoint` pushes as well."""
    found = [
        checkpoint / path for checkpoint in folder.glob("checkpoint-*") for path in list_checkpoint_files(checkpoint)
    ]
    assert bool(found) == (folder.name != "merge")
    return found


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pushed_files_of_a_run(name, folders):
    """All but checkpoints and the files that a run reads to resume."""
    staying = find_push_contents(folders[name])[1]
    assert {*staying} - {"run.json", ".run.lock"} == {path.name for path in folders[name].glob("checkpoint-*")}


@pytest.mark.parametrize("name", NAMES)
def test_no_machine_paths_or_user_names(name, folders):
    places = (USER_NAME, str(folders[name].parents[2]), tempfile.gettempdir(), str(ROOT), str(Path.home()) + os.sep)
    for path in going_files(folders[name]) + checkpoint_files(folders[name]):
        if path.name == "adapter_config.json" and (name == "lora" or path.parent != folders[name]):
            continue  # PEFT finds the base by this path: a folder, for which every push is refused
        data = path.read_bytes()
        for place in places:
            assert place.encode() not in data, (path.relative_to(folders[name]), place)


def test_lineage_of_a_chain_of_stages(folders):
    """Without paths it still names the files and the model that each stage has read."""
    lineage = json.loads((folders["merge"] / "lineage.json").read_text())
    assert lineage["parent"]["name_or_path"] == "lora"
    assert lineage["parent"]["lineage"]["configuration"]["chat_template"] == "recipes/templates/chatml.jinja"
    sources = [source["path"] for stage in list_stages(lineage) for source in stage["data"]["train"]]
    assert sources == ["text_train.jsonl", "sft_train.jsonl", "sft_train.jsonl"]


def test_paths_without_the_machine(tmp_path, monkeypatch):
    home = tmp_path / "home" / USER_NAME
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for folder in (tmp_path, home / "project"):
        monkeypatch.chdir(folder)
        assert portable({"a": [str(home / "data" / "a.txt"), "org/name", "data/a.txt", 5, None]}) == {
            "a": ["a.txt", "org/name", "data/a.txt", 5, None]
        }
        assert portable(f"../{USER_NAME}/a.txt") == portable("~/texts/a.txt") == "a.txt"
    assert portable(str(home / "project" / "data" / "a.txt")) == "data/a.txt"
    assert portable(str(ROOT / "recipes" / "sft.py")) == "recipes/sft.py"


def test_files_of_a_checkpoint(folders, tmp_path):
    """The files that its manifest lists, unless they are links now."""
    checkpoint = shutil.copytree(folders["clm"] / "checkpoint-2", tmp_path / "checkpoint-2")
    before = list_checkpoint_files(checkpoint)
    assert {"optimizer.pt", "complete.json", "model.safetensors"} <= {*before}
    assert find_pickles(before) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    (checkpoint / "customers.csv").write_text("a,b")
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to(tmp_path / "elsewhere")
    assert list_checkpoint_files(checkpoint) == [path for path in before if path != "config.json"]


# --- Secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_false_secrets(name, folders):
    folder = folders[name]
    check_secrets(folder, find_push_contents(folder)[0], token=None)
    check_secrets(folder, [path.relative_to(folder).as_posix() for path in checkpoint_files(folder)], token=None)


def test_planted_keys(folders, tmp_path):
    """The key of every provider is found in every text file, with its line, and is not printed."""
    folder = shutil.copytree(folders["dpo"], tmp_path / "dpo")
    texts = [path for path in going_files(folder) if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) >= 10
    for path in texts:
        text = path.read_text()
        for provider, key in KEYS.items():
            half = len(text) // 2
            path.write_text(f"{text[:half]}\n{key}\n{text[half:]}")
            with pytest.raises(UserError) as error:
                check_secrets(folder, find_push_contents(folder)[0], token=None)
            sentence = str(error.value)
            line = text[:half].count("\n") + 2
            assert sentence.startswith(f"{path} holds a secret in line {line} (detector: "), (path.name, provider)
            assert key not in sentence
        path.write_text(text)


def test_secrets_in_files_of_a_run(folders, tmp_path, capsys):
    """The push is refused before the first request; files of other programs and targets of links are not pushed."""
    folder = shutil.copytree(folders["clm"], tmp_path / "clm")
    for name in ("customers.csv", "secrets.yaml", "model.ckpt"):
        (folder / name).write_text(KEYS["Stripe"])
    (folder / "notes.md").symlink_to(folder / "secrets.yaml")
    push(folder, f"{USER}/clm", dry_run=True)
    output = capsys.readouterr().out
    for line in (
        "customers.csv (not a file that a run writes)",
        "secrets.yaml (not a file that a run writes)",
        "model.ckpt (a pickle)",
        "notes.md (a link, which a push does not follow)",
    ):
        assert f"stays here  {line}\n" in output
    with pytest.raises(UserError, match=r"secrets\.yaml holds a secret in line 1 \(detector: Stripe Access Key\)"):
        push(folder, f"{USER}/clm", dry_run=True, include=["secrets.yaml"])
    samples = folder / "samples.md"
    samples.write_text(f"{samples.read_text()}\nthe corpus held {KEYS['GitHub']}\n")
    with pytest.raises(UserError, match=r"samples\.md holds a secret in line \d+ \(detector: GitHub Token\)"):
        push(folder, f"{USER}/clm", dry_run=True)
    assert KEYS["GitHub"] not in capsys.readouterr().out


def test_command_that_repeats_a_push():
    words = push_command(Path("my run"), "me/it", private=False, revision="dev", include=["LICENSE", "NOTICE"])
    assert words == (
        "python scripts/push_to_hub.py 'my run' --repo-id me/it --public --revision dev --include LICENSE "
        "--include NOTICE"
    )
    assert push_command(Path("run"), "me/it", True, None, []).endswith("push_to_hub.py run --repo-id me/it")


# --- A finished run that has not been pushed -------------------------------------------------------------------------


PATH = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(f"{constants.ENDPOINT}/")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for the client of this process."""
    with HubServer() as server:
        values = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{PATH}"}
        values |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HOME": str(tmp_path / "home")}
        for key, value in values.items():
            monkeypatch.setattr(constants, key, value)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_dropped_connections(hub):
    """A run starts although its first two attempts to reach the Hub fail; a third failure is reported."""
    hub.connections_to_drop = 2
    assert check_token(None) == WRITE_TOKEN
    close_session()
    hub.connections_to_drop = 2
    assert create_repository("new", private=True, token=None) == f"{USER}/new"
    assert hub.repo(f"{USER}/new").private
    close_session()
    hub.connections_to_drop = 3
    with pytest.raises(UserError, match=f"^push_to_hub: {hub.url} cannot be reached"):
        check_token(None)


def test_refused_repository_without_retry(hub):
    """Only a connection that fails is tried again, not an answer of the Hub."""
    with pytest.raises(HTTPError):
        create_repository("someone/else", private=True, token=None)
    assert [request.status for request in hub.sent("^POST /api/repos/create")] == [403]


def test_repository_on_another_hub(hub, tmp_path):
    """The endpoint is read for each request: transformers keeps a client of the endpoint it was first used with."""
    trainer = PushMixin()
    trainer.model = None
    trainer.is_world_process_zero = lambda: True
    trainer.args = SimpleNamespace(hub_model_id="mine", hub_private_repo=None, hub_token=None, output_dir=str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint="http://127.0.0.1:9"))
        trainer.init_hf_repo()
    assert trainer.hub_model_id == f"{USER}/mine"
    assert hub.repo(f"{USER}/mine").private


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*ADAPTERS, "merge")])
def test_finished_run_is_pushed_by_its_command(name, hub, folders, commands, capsys):
    """Once to each repository, and no pushed file names the machine."""
    recipe, words = commands[name]
    weights = (folders[name] / "model.safetensors").stat().st_mtime_ns
    run_recipe(recipe, [*words, "--push_to_hub", "true"])
    output = capsys.readouterr().out
    assert f"it has not been pushed to {name} yet" in output and f"pushed to {hub.url}" in output
    assert hub.repo(f"{USER}/{name}").titles == ["initial commit", "End of training"]
    assert hub.repo(f"{USER}/{name}").private
    assert f'"{USER}/{name}"' in hub.repo(f"{USER}/{name}").files["README.md"].decode(), (
        "the usage names the repository"
    )
    assert {*hub.repo(f"{USER}/{name}").files} - {".gitattributes"} == {*find_push_contents(folders[name])[0]}
    for path, data in hub.repo(f"{USER}/{name}").files.items():
        assert USER_NAME.encode() not in data and tempfile.gettempdir().encode() not in data, path
    if name != "clm":
        return
    run_recipe(recipe, [*words, "--push_to_hub", "true"])
    assert f"it has been pushed to {USER}/{name}\n" in capsys.readouterr().out
    run_recipe(recipe, [*words, "--push_to_hub", "true", "--hub_model_id", f"{USER}/other"])
    assert hub.repo(f"{USER}/other").files.keys() == hub.repo(f"{USER}/{name}").files.keys()
    assert len(hub.repo(f"{USER}/{name}").titles) == 2
    assert (folders[name] / "model.safetensors").stat().st_mtime_ns == weights, "nothing is trained again"


@pytest.mark.parametrize(
    ("request_that_fails", "status"),
    [("^POST .*/commit/main$", 500), ("^HEAD .*/resolve/.*safetensors", 404), ("whoami", 503)],
    ids=["upload", "download", "token"],
)
def test_failed_push_is_repeated(request_that_fails, status, hub, folders, commands):
    recipe, words = commands["mlm"]
    words = [*words, "--push_to_hub", "true", "--hub_model_id", f"{USER}/again"]
    (folders["mlm"] / "pushed.json").unlink(missing_ok=True)
    before = 1 if request_that_fails == "whoami" else 0  # the recipe asks before anything else
    hub.break_requests(request_that_fails, status=status, after=before)
    with pytest.raises(UserError) as error:
        run_recipe(recipe, words)
    command = f"push again with: python scripts/push_to_hub.py {folders['mlm']} --repo-id {USER}/again"
    assert str(error.value).endswith(command)
    assert not (folders["mlm"] / "pushed.json").exists()
    hub.faults.clear()
    run_recipe(recipe, words)
    assert json.loads((folders["mlm"] / "pushed.json").read_text()).keys() == {f"{USER}/again"}
    assert "model.safetensors" in hub.repo(f"{USER}/again").files


def test_links_in_a_checkpoint(hub, folders, tmp_path):
    """Checkpoints are copied aside before they are pushed, and links in them stay links."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    checkpoint = shutil.copytree(folders["clm"] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    (checkpoint / "samples.md").symlink_to(elsewhere / "config.json")
    (checkpoint / "1_Pooling").symlink_to(elsewhere)
    (checkpoint / "scheduler.pt").unlink()
    (checkpoint / "scheduler.pt").symlink_to(elsewhere / "config.json")
    hub.create(f"{USER}/run", private=True)
    trainer = PushMixin()
    trainer.args = SimpleNamespace(
        push_to_hub=True,
        hub_strategy="checkpoint",
        hub_always_push=True,
        output_dir=str(tmp_path / "run"),
        hub_token=None,
        hub_revision=None,
    )
    trainer.state, trainer.control, trainer.hub_model_id = SimpleNamespace(global_step=2), None, f"{USER}/run"
    trainer.callback_handler = SimpleNamespace(on_push_begin=lambda *args: None)
    trainer.is_world_process_zero = lambda: True
    trainer.push_checkpoint(str(checkpoint))
    trainer._finish_current_push()
    pushed = {path.removeprefix("last-checkpoint/") for path in hub.repo(f"{USER}/run").files}
    assert {"model.safetensors", "optimizer.pt", "complete.json"} <= pushed
    assert not {"samples.md", "1_Pooling/config.json", "scheduler.pt"} & pushed


def test_secret_in_a_checkpoint(hub, folders, tokenizers, commands, tmp_path, capsys):
    """Training continues without that push, and the push at the end is refused."""
    shutil.copytree(tokenizers["clm"], tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(f"{{# {KEYS['Slack']} #}}{{{{ messages }}}}")
    recipe, words = commands["clm"]
    changed = {"tokenizer_name_or_path": tmp_path / "tokenizer", "output_dir": tmp_path / "run"}
    changed |= {"push_to_hub": "true", "hub_strategy": "every_save", "hub_always_push": "true"}
    with pytest.raises(UserError, match=r"chat_template\.jinja holds a secret in line 1 \(detector: Slack Token\)"):
        run_recipe(recipe, [*words, *words_of(changed)])
    captured = capsys.readouterr()
    assert captured.err.count("warning: a push during training failed: ") == 2
    assert KEYS["Slack"] not in captured.out + captured.err
    assert (tmp_path / "run" / "metrics.json").exists()
    assert hub.repo(f"{USER}/run").titles == ["initial commit"]
