"""Model cards and pushes, with the real client in processes of its own and the Hub of hub_server.py."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, recipe_arguments, run_recipe
from hub_server import READ_TOKEN, USER, WRITE_TOKEN, HubServer, Refusal
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

from unlabeled import UserError
from unlabeled.hub.client import describe_push_failure
from unlabeled.hub.contents import check_links, check_secrets, find_push_contents
from unlabeled.hub.push import compute_probe_logits, push
from unlabeled.reporting.model_card import write_card

NAME = f"{USER}/tiny"


@pytest.fixture(scope="module")
def finished(corpus, tokenizers, tmp_path_factory) -> Path:
    """The output_dir of a finished run, with a checkpoint in it."""
    folder = tmp_path_factory.mktemp("finished") / "tiny"
    run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, folder))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of the finished folder, which a test may damage."""
    return shutil.copytree(finished, tmp_path / "tiny")


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def client(hub, tmp_path, *command: str, token: str | None = WRITE_TOKEN) -> subprocess.CompletedProcess:
    """Run a script, a recipe or code against the Hub of this test. Nothing is cached between calls."""
    home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
    command = ["-c", *command] if "\n" in command[0] else command
    environment = hub.environment(home, token) | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def push_script(hub, tmp_path, folder, *options: str, name: str = NAME, **more) -> subprocess.CompletedProcess:
    return client(hub, tmp_path, "scripts/push_to_hub.py", str(folder), "--repo-id", name, *options, **more)


def refusal(done: subprocess.CompletedProcess) -> str:
    """The error message of a command that exited with status 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


def command_of(sentence: str) -> list[str]:
    """The command at the end of an error message."""
    return shlex.split(sentence.split("; nothing is lost, push again with: python ")[1])


def leaks(hub) -> list[str]:
    """Files in any commit on the Hub that hold a token."""
    return [
        path
        for repo in hub.repos.values()
        for commit in repo.branches["main"]
        for path, file in commit.files.items()
        if WRITE_TOKEN.encode() in file.data
    ]


# --- Which files are pushed ------------------------------------------------------------------------------------------


def test_push_contents(tmp_path):
    going = {
        "README.md", "additional_chat_templates/tools.jinja", "chat_template.jinja", "config.json", "lineage.json",
        "loss.png", "metrics.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "samples.md",
        "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "2_Dense/model.safetensors", "base/model.safetensors",
    }  # fmt: skip
    staying = {
        ".cache": "hidden", "checkpoint-4": "with the state of the optimizer", "complete.json": "for resuming only",
        "events.log": "a log", "global_step4": "with the state of the optimizer", "incomplete": "unfinished",
        "optimizer.pt": "a pickle", "pushing": "unfinished", "pytorch_model.bin": "a pickle",
        "rng_state_0.pth": "a pickle", "run.json": "for resuming only", "runs": "a log",
        "trainer_state.json": "for resuming only", "training_args.bin": "a pickle", "model.ckpt": "a pickle",
        "pushed.json": "the record of pushes",
        "customers.csv": "not a file that a run writes", "secrets.yaml": "not a file that a run writes",
        "other.safetensors": "not a file that a run writes", "data": "not a file that a run writes",
        "base/run.json": "for resuming only", "1_Pooling/notes.txt": "not a file that a run writes",
        "base/README.md": "not a file that a run writes", "report.html": "not a file that a run writes",
    }  # fmt: skip
    folders = {".cache", "checkpoint-4", "global_step4", "incomplete", "pushing", "runs", "data"}
    for name in going | staying.keys():
        file = tmp_path / name / "model.safetensors" if name in folders else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("four")
    assert find_push_contents(tmp_path) == (dict.fromkeys(going, 4), staying)
    going = find_push_contents(tmp_path, include=["report.html", "data/model.safetensors"])[0].keys() - going
    assert going == {"report.html", "data/model.safetensors"}


def test_links_in_a_folder(tmp_path):
    """Links to files and to folders are not followed."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for path in (folder / "config.json", folder / "checkpoint-2" / "config.json", elsewhere / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    links = {"samples.md": "config.json", "notes.txt": "config.json", "1_Pooling": "", "chat_template.jinja": "nowhere"}
    for name, target in links.items():
        (folder / name).symlink_to(elsewhere / target)
    going, staying = find_push_contents(folder)
    assert going == {"config.json": 2}
    assert {name for name, reason in staying.items() if reason.startswith("a link")} == {*links}
    for name in ("notes.txt", "1_Pooling/config.json", "../elsewhere/config.json", str(elsewhere / "config.json"), "x"):
        with pytest.raises(UserError, match=f"^--include {re.escape(name)}: no file of {folder}"):
            find_push_contents(folder, include=[name])
    # What stays would leave the model incomplete.
    check_links(folder, {"samples.md": staying["samples.md"], "notes.txt": staying["notes.txt"]})
    for name in ("1_Pooling", "chat_template.jinja"):
        with pytest.raises(UserError, match=f"{name} is a part of the model and a link"):
            check_links(folder, {name: staying[name]})


def test_reason_of_a_failed_push():
    lost, wrapped = HTTPError("no route"), RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    lost.__cause__, wrapped.__cause__ = OSError(111, "Connection refused"), lost
    assert describe_push_failure(wrapped, NAME).endswith("cannot be reached (HTTPError: connection refused)")
    assert describe_push_failure(OSError(28, "No space left on device"), NAME) == "[Errno 28] No space left on device"


@pytest.mark.parametrize("secret", ["my-own-token", "hf_" + "aB3" * 11 + "x"])
@pytest.mark.parametrize("before", [0, (1 << 24) - 5], ids=["at the start", "across two blocks"])
def test_token_in_a_file(secret, before, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b" " * before + secret.encode())
    with pytest.raises(UserError, match=r"model\.safetensors holds a Hub token"):
        check_secrets(tmp_path, ["model.safetensors"], "my-own-token")
    file.write_bytes(b" " * before + b"hf_not_one, my-own token")
    check_secrets(tmp_path, ["model.safetensors"], "my-own-token")


def test_push_of_an_unfinished_folder(folder, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        push(tmp_path, NAME, dry_run=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match=f"its base model is the folder {folder}; push the base first"):
        push(adapter, NAME, dry_run=True)
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match="unfinished run; run its command again"):
        push(folder, NAME, dry_run=True)


def test_push_of_missing_or_extra_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"does not load \(.*\['model\.norm\.weight'\] and 0 more"):
        push(folder, NAME, dry_run=True)
    save_file(tensors | {"model.norm.weight": gone, "extra": gone.clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"does not load \(.*\['extra'\] and 0 more"):
        push(folder, NAME, dry_run=True)


def test_probe_logits(folder):
    before = compute_probe_logits(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.allclose(compute_probe_logits(folder), 2 * before, atol=1e-5)


# --- The card ---------------------------------------------------------------------------------------------------------


def lineage_of(stage: str, parent: dict | None, metrics: dict, **source) -> dict:
    data = {"train": [{"path": "org/texts", **source}], "splits": {"validation": {"documents": 60, "bytes": 12345}}}
    plan = {"parameters": 1_500_000, "flops": 6.1e12, "device": "a CPU", "precision": "fp32"}
    metrics = {"train_tokens": 819_200, "train_seconds": 110.6} | metrics
    return {"stage": stage, "parent": parent, "configuration": {}, "data": data, "plan": plan, "metrics": metrics,
            "versions": {"torch": "2"}, "git": None}  # fmt: skip


def card_of(folder: Path, lineage: dict, example: str = 'She said "no"') -> ModelCard:
    """Write a card and parse it as the Hub does; no field may be blank."""
    folder.mkdir(exist_ok=True)
    write_card(str(folder), lineage, example)
    card = ModelCard.load(folder / "README.md")
    for blank in ("None", "[]", "nan", "fine-tuned version of", "|---|---|\n\n"):
        assert blank not in card.content, blank
    return card


def usage(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.S)[1]


def test_card_of_a_model_from_scratch(tmp_path):
    metrics = {"eval_loss": 4.53729, "perplexity": 93.4375, "bits_per_byte": 2.3007, "unigram_entropy": 6.376}
    lineage = lineage_of("pretrain_clm", None, metrics, licence="cc-by-4.0")
    card = card_of(tmp_path / "mine", lineage)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "cc-by-4.0",
        "datasets": ["org/texts"],
        "tags": ["unlabeled", "pretrain_clm"],
    }
    assert (
        "| pretrain_clm | 819,200 | 6.1e+12 | 111 | bits per byte 2.3007, held-out loss (nats per target token) 4.5373"
        in card.text
    )
    assert "Started from random weights." in card.text
    assert "- `org/texts`, licence: cc-by-4.0" in card.text
    assert "| bits per byte | 2.3007 |" in card.text
    assert "(60 documents, 12,345 bytes)" in card.text
    assert "loss.png" not in card.text  # there is none
    assert 'generate("She said \\"no\\"", max_new_tokens=50)[0]["generated_text"])' in usage(card)
    compile(usage(card), "usage", "exec")


def test_card_of_a_chain(tmp_path):
    first = lineage_of(
        "pretrain_clm", {"name_or_path": "org/base"}, {"eval_loss": 3.0, "perplexity": 20.1}, licence="mit"
    )
    second = lineage_of(
        "sft",
        {"name_or_path": "/disk/me/run", "weights": {}, "lineage": first},
        {"eval_loss": 2.0, "eval_loss_before": 2.9, "perplexity": 7.39},
    )
    second["data"]["train"] = [{"path": "/disk/me/talks.jsonl", "files": {"talks.jsonl": "0"}}]
    preferences = {"preference_accuracy": 0.75, "preference_accuracy_before": 0.5, "reward_margin": 0.25}
    third = lineage_of("dpo", {"name_or_path": "out/sft", "weights": {}, "lineage": second}, preferences)
    fourth = {**lineage_of("merge", {"name_or_path": "out/dpo", "weights": {}, "lineage": third}, {}), "data": None}
    fourth["metrics"] = {"logits_difference": 2e-6, "samples": None}
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "chat_template.jinja").write_text("{{ messages }}")
    card = card_of(tmp_path / "merged", fourth)
    assert card.data.base_model == "org/base"
    assert card.data.license is None  # the base has one of its own, and talks.jsonl does not say
    assert card.data.tags == ["unlabeled", "pretrain_clm", "sft", "dpo", "merge"]
    rows = [line for line in card.text.splitlines() if re.match(r"\| (pretrain|sft|dpo|merge)", line)]
    assert [row.split(" | ")[-1].rstrip(" |") for row in rows] == [
        "held-out loss (nats per target token) 3.0000, perplexity 20.10",
        "held-out loss (nats per target token) 2.0000 (before 2.9000), perplexity 7.39",
        "preference accuracy 0.750 (before 0.500), reward margin 0.250",
        "largest difference of a logit from the model with adapter 2.0e-06",
    ]
    assert rows[-1].startswith("| merge | — | 6.1e+12 | — |")
    assert "Started from `org/base`." in card.text
    assert "- `talks.jsonl`, licence: not stated" in card.text
    assert "/disk/me" not in card.text
    assert '[{"role": "user", "content": "She said \\"no\\""}]' in usage(card)
    compile(usage(card), "usage", "exec")


def test_card_of_preference_tuning(tmp_path):
    metrics = {"eval_loss": 0.61, "eval_loss_before": 0.6931, "preference_accuracy": 0.75, "reward_accuracy": 0.8}
    card = card_of(tmp_path / "dpo", lineage_of("dpo", {"name_or_path": "org/base"}, metrics))
    assert "| metric of the last stage | | before it |\n|---|---|---|" in card.text
    assert "| held-out loss (nats per pair) | 0.6100 | 0.6931 |" in card.text
    assert "| preference accuracy | 0.750 |  |" in card.text
    assert "target token" not in card.text


def test_card_of_masked_model_and_adapter(tmp_path):
    card = card_of(tmp_path / "masked", lineage_of("pretrain_mlm", None, {"eval_loss": 3.3, "perplexity": 27.1}))
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.license is None
    assert "licence: not stated" in card.text
    compile(usage(card), "usage", "exec")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    card = card_of(tmp_path / "adapter", lineage_of("sft", {"name_or_path": "org/base"}, {"eval_loss": 2.0}))
    assert (card.data.library_name, card.data.base_model) == ("peft", "org/base")
    assert "needs peft" in usage(card)


def test_card_own_metric(tmp_path):
    """A number that is not in the registry, as a trainer of one's own may compute, is in the card under its key."""
    metrics = {"eval_loss": 2.0, "eval_rhymes": 0.25, "eval_rhymes_before": 0.125}
    card = card_of(tmp_path / "sft", lineage_of("sft", {"name_or_path": "org/base"}, metrics))
    assert "| eval_rhymes | 0.25 | 0.125 |" in card.text
    assert "train_tokens" not in card.text


@pytest.mark.parametrize("licence", ["public domain", "free: [for] all", "CC BY"])
def test_card_with_unknown_licence(licence, tmp_path):
    card = card_of(tmp_path / "mine", lineage_of("pretrain_clm", None, {"eval_loss": 4.5}, licence=licence))
    assert card.data.license is None
    assert f"licence: {licence}" in card.text


# --- The script -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run(hub, folder, tmp_path):
    done = push_script(hub, tmp_path, folder, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not [request for request in hub.sent() if request.method != "GET"]
    assert not hub.repos
    assert re.search(r"[\d,]+  model\.safetensors\n", done.stdout)
    assert "checkpoint-4 (with the state of the optimizer)" in done.stdout
    assert f"for {NAME}, private" in done.stdout


@pytest.mark.slow
def test_private_push(hub, folder, tmp_path):
    done = push_script(hub, tmp_path, folder)
    assert done.returncode == 0, done.stderr
    repo = hub.repo(NAME)
    assert repo.private
    assert repo.titles == ["initial commit", "Push a trained model"]
    assert set(repo.files) == {".gitattributes", *find_push_contents(folder)[0]}
    assert repo.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_bytes(repo.files["README.md"])
    shown = usage(ModelCard.load(tmp_path / "card" / "README.md"))
    assert f'model="{NAME}"' in shown
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained("{NAME}")("the year was old", return_tensors="pt")["input_ids"]
torch.save(AutoModelForCausalLM.from_pretrained("{NAME}")(ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
{shown}"""
    used = client(hub, tmp_path, code)
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip()  # the usage of the card printed something
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("the year was old", return_tensors="pt")["input_ids"]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), AutoModelForCausalLM.from_pretrained(folder)(ids).logits)


@pytest.mark.slow
def test_push_of_an_adapter(hub, folder, tmp_path):
    """The base is on the Hub; the logits are those of base and adapter together."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert push_script(hub, tmp_path, folder).returncode == 0
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).eval()
    model.peft_config["default"].base_model_name_or_path = NAME
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(adapter)
    write_card(str(adapter), lineage_of("sft", {"name_or_path": NAME}, {"eval_loss": 2.0}), "the year was")
    done = push_script(hub, tmp_path, adapter, name=f"{USER}/adapter")
    assert done.returncode == 0, done.stderr
    (tmp_path / "README.md").write_bytes(hub.repo(f"{USER}/adapter").files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", NAME)
    code = f"""
{usage(card)}
import torch
ids = generate.tokenizer("the year was old", return_tensors="pt")["input_ids"]
torch.save(generate.model(ids).logits.detach(), {str(tmp_path / "logits.pt")!r})"""
    used = client(hub, tmp_path, code)
    assert used.returncode == 0, used.stderr
    ids = tokenizer("the year was old", return_tensors="pt")["input_ids"]
    with model.disable_adapter():
        base = model(ids).logits
    found = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(found, model(ids).logits, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-3)


@pytest.mark.parametrize(
    ("token", "name", "sentence"),
    [
        (None, NAME, "push_to_hub needs a token; set HF_TOKEN or run `hf auth login`"),
        ("hf_wrong", NAME, "push_to_hub: {url} refuses the token (status 401); set HF_TOKEN to a valid one"),
        (READ_TOKEN, NAME, "push_to_hub: the token may only read; set HF_TOKEN to one that may write"),
    ],
)
def test_bad_token(token, name, sentence, hub, folder, tmp_path):
    done = push_script(hub, tmp_path, folder, name=name, token=token)
    again = f"python scripts/push_to_hub.py {folder} --repo-id {name}"
    assert refusal(done) == f"{sentence.format(url=hub.url)}; nothing is lost, push again with: {again}"
    assert not hub.repos


@pytest.mark.slow
def test_foreign_and_public_repositories(hub, folder, tmp_path):
    done = push_script(hub, tmp_path, folder, name="someone/else")
    assert "the token may not write to someone/else (status 403)" in refusal(done)
    hub.create(NAME, private=False)
    assert f"{NAME} is public already; push with --public" in refusal(push_script(hub, tmp_path, folder))
    assert hub.repo(NAME).titles == ["initial commit"]
    assert push_script(hub, tmp_path, folder, "--public").returncode == 0
    assert "model.safetensors" in hub.repo(NAME).files


@pytest.mark.slow
def test_push_after_failure(hub, folder, tmp_path):
    """A failed upload is retried; after a failed commit, the command in the message sends no large file again."""
    hub.break_requests("^PUT /lfs/", status=500, times=1)
    hub.break_requests("^POST .*/commit/main$", status=500, times=1)
    sentence = refusal(push_script(hub, tmp_path, folder))
    assert sentence.startswith(f"{folder} was not pushed to {NAME}: the Hub answers with status 500; nothing is lost")
    assert hub.repo(NAME).titles == ["initial commit"]
    large = (folder / "model.safetensors").stat().st_size
    assert [request.status for request in hub.sent("^PUT") if request.bytes == large].count(200) == 1
    hub.requests.clear()
    done = client(hub, tmp_path, *command_of(sentence))
    assert done.returncode == 0, done.stderr
    assert not hub.sent("^PUT")
    assert hub.repo(NAME).titles == ["initial commit", "Push a trained model"]
    hub.requests.clear()
    assert push_script(hub, tmp_path, folder).returncode == 0  # once more: there is nothing to commit
    assert not hub.sent("^POST .*/commit/main$")


@pytest.mark.slow
def test_push_of_a_changed_download(hub, folder, tmp_path):
    def spoil(hub, request):
        if re.match("HEAD .*/resolve/.*safetensors", request):
            file = hub.repo(NAME).at("main").files["model.safetensors"]
            file.data = file.data[:-64] + bytes(64)

    hub.on_request = spoil
    sentence = refusal(push_script(hub, tmp_path, folder))
    assert "does not come back from there: the logits are others than those of the folder" in sentence


# --- Pushes of Trainer ------------------------------------------------------------------------------------------------


def train(hub, tmp_path, corpus, tokenizers, token=WRITE_TOKEN, **options) -> subprocess.CompletedProcess:
    """Run four steps with checkpoints after the second and the fourth, of which one is kept."""
    options = {"push_to_hub": "true", "hub_always_push": "true", "save_steps": 2, "save_total_limit": 1} | options
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "tiny", **options)
    return client(hub, tmp_path, "recipes/pretrain_clm.py", *arguments, token=token)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategies(strategy, hub, corpus, tokenizers, tmp_path):
    """Each save is one commit of the model; optimizer states are pushed only if the strategy asks for them."""
    done = train(hub, tmp_path, corpus, tokenizers, hub_strategy=strategy)
    assert done.returncode == 0, done.stderr
    assert "warning: a push" not in done.stderr
    repo = hub.repo(NAME)
    saves = [] if strategy == "end" else ["Training in progress, step 2", "Training in progress, step 4"]
    assert repo.titles == ["initial commit", *saves, "End of training"]
    at = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}.get(strategy, [])
    states = {path for path in repo.files if re.search("optimizer|scheduler|rng_state", path)}
    assert states == {f"{inside}/{name}" for inside in at for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
    assert not [path for path in repo.files if "training_args" in path]
    announced = f"hub_strategy {strategy} pushes pickles (optimizer.pt, rng_state.pth, scheduler.pt)"
    assert done.stdout.count(announced) == bool(at)
    assert leaks(hub) == []
    assert repo.private
    assert json.loads(repo.files["config.json"])["use_cache"] is True
    assert repo.files["model.safetensors"] == (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert b"How it was trained" in repo.files["README.md"]
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir() if path.is_dir()) == ["checkpoint-4"]
    assert not list((tmp_path / "tiny").rglob("training_args.bin"))  # a pickle
    if at:  # the pushed checkpoint is complete, so a run can resume from it
        folder = tmp_path / "resumed"
        for path, data in repo.files.items():
            if path.startswith(f"{at[-1]}/"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
        from unlabeled.runtime.checkpoints import find_checkpoint_defect

        assert find_checkpoint_defect(folder / at[-1]) is None


@pytest.mark.slow
def test_repository_deleted_during_run(hub, corpus, tokenizers, tmp_path):
    """Training finishes, everything is on disk, each failure is reported, and one command pushes the folder."""
    commits = []

    def delete(hub, request):
        if request.endswith("/commit/main"):
            commits.append(request)
            if len(commits) == 2:
                del hub.repos["models", NAME]

    hub.on_request = delete
    done = train(hub, tmp_path, corpus, tokenizers, hub_strategy="every_save")
    sentence = refusal(done)
    gone = f"the Hub has no {NAME}, or the token may not see it"
    assert f"warning: a push during training failed: {gone}\n" in done.stderr
    assert sentence.startswith(f"{tmp_path / 'tiny'} was not pushed to {NAME}: {gone}; nothing is lost")
    assert json.loads((tmp_path / "tiny" / "metrics.json").read_text())["steps"] == 4
    assert not hub.repos  # somebody deleted it on purpose: it is not created again
    hub.on_request = None
    assert client(hub, tmp_path, *command_of(sentence)).returncode == 0
    assert hub.repo(NAME).files["model.safetensors"] == (tmp_path / "tiny" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_run_killed_before_its_push(hub, corpus, tokenizers, tmp_path):
    """Everything is on disk already: the same command pushes it without training."""
    processes: list[subprocess.Popen] = []

    def kill(hub, request):
        if request.endswith("/commit/main") and processes[0].poll() is None:
            processes[0].kill()
            raise Refusal(503, "", "killed")

    hub.on_request = kill
    options = {"push_to_hub": "true", "hub_strategy": "end"}
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "tiny", **options)
    environment = hub.environment(tmp_path / "home", WRITE_TOKEN) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipes/pretrain_clm.py", *arguments]
    processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL))
    assert processes[0].wait() == -signal.SIGKILL
    assert (tmp_path / "tiny" / "metrics.json").exists() and not (tmp_path / "tiny" / "pushed.json").exists()
    weights = (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns
    done = train(hub, tmp_path, corpus, tokenizers, hub_strategy="end")
    assert done.returncode == 0, done.stderr
    assert "it has not been pushed to tiny yet, which is done now" in done.stdout
    assert hub.repo(NAME).files["model.safetensors"] == (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_failed_push_during_training(hub, corpus, tokenizers, tmp_path):
    hub.break_requests("^POST .*/commit/main$", status=503, times=1)
    done = train(hub, tmp_path, corpus, tokenizers, hub_strategy="every_save")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: a push during training failed: the Hub answers with status 503") == 1
    assert hub.repo(NAME).titles == ["initial commit", "Training in progress, step 4", "End of training"]


@pytest.mark.slow
def test_foreign_repository_before_training(hub, corpus, tokenizers, tmp_path):
    sentence = refusal(train(hub, tmp_path, corpus, tokenizers, hub_model_id="someone/else"))
    assert sentence == (
        "push_to_hub: the token may not write to someone/else (status 403); set hub_model_id to a repository that is "
        "yours"
    )
    assert not list((tmp_path / "tiny").glob("checkpoint-*"))
