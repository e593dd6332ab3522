"""A run is the same run while its content is the same; an adapter finds its own base wherever its folder lies."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, run_recipe
from hub_server import HubServer
from test_bad_input import largest_file
from test_model_loading import HEADS, logits_of, save_model, tuning_arguments

from unlabeled import UserError
from unlabeled.checkpoints import file_sha256
from unlabeled.modeling import OWN_BASE_PATH, adapter_base, reload

LORA = {"adapter": "lora", "lora_r": 4}


@pytest.fixture(scope="module", autouse=True)
def no_samples():
    """Sampling takes longer than all the rest of such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids, **options: ids)
        yield


@pytest.fixture(scope="module")
def work(tokenizers, tmp_path_factory) -> Path:
    """A folder with an untrained model, `llama`, in it; the data of the runs are written beside it."""
    folder = tmp_path_factory.mktemp("identity")
    save_model(folder / "llama", "llama", tokenizers["clm"])
    return folder


@pytest.fixture(scope="module")
def adapters(work):
    """Makes the folder of a finished adapter with its own base, once for each stage."""
    folders = {}

    def make(stage: str) -> Path:
        if stage not in folders:
            folders[stage] = work / stage
            run_recipe(stage, tuning_arguments(stage, work / "llama", folders[stage], **LORA))
        return folders[stage]

    return make


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir())}


# --- An adapter with its own base -------------------------------------------------------------------------------------


def unfinish(finished: Path, folder: Path) -> Path:
    """A copy of a run as it is when it is killed just before its last write."""
    shutil.copytree(finished, folder)
    (folder / "metrics.json").unlink()
    return folder


@pytest.mark.parametrize("stage", HEADS)
def test_torn_base_is_written_again(stage, adapters, work, tmp_path):
    """Files cut short by a kill, as a recipe that writes them in place leaves them, and what was being written aside."""
    finished = adapters(stage)
    folder = unfinish(finished, tmp_path / "run")
    for name in ("base/config.json", "base/model.safetensors", "config.json", "model.safetensors.index.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "base.incomplete").mkdir()
    (folder / "base.incomplete" / "config.json").write_text("{")
    run_recipe(stage, tuning_arguments(stage, work / "llama", folder, **LORA))
    assert hashes(folder / "base") == hashes(finished / "base"), "also a new head, which is drawn"
    assert not (folder / "base.incomplete").exists()
    assert torch.equal(logits_of(reload(HEADS[stage], str(folder))), logits_of(reload(HEADS[stage], str(finished))))


@pytest.mark.parametrize("stage", ["sft", "classify"])
def test_full_disk_while_the_base_is_written(stage, adapters, work, tmp_path):
    """The base is larger than everything else that the run writes; it is absent, and the same command writes it."""
    folder = tmp_path / "run"
    words = tuning_arguments(stage, work / "llama", folder, **LORA)
    sizes = sorted(file.stat().st_size for file in adapters(stage).rglob("*") if file.is_file())
    with largest_file(sizes[-1] - 1), pytest.raises(UserError) as refused:
        run_recipe(stage, words)
    assert str(refused.value) == (
        f"cannot write the base model of the adapter to {folder} (File too large); the last complete checkpoint is "
        f"{folder / 'checkpoint-2'}: make room and run the same command again"
    )
    assert not (folder / "base").exists() and not (folder / "base.incomplete").exists()
    with pytest.raises(UserError, match="names no base model, as the run that wrote it has not finished"):
        adapter_base(str(folder))
    run_recipe(stage, words)
    assert hashes(folder / "base") == hashes(adapters(stage) / "base")


READERS = """
import json, sys
from pathlib import Path
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

sys.path[:0] = [sys.argv[2]]
from generate import load_folder  # as evaluate_model.py does
from merge_adapter import merge
from unlabeled.arguments import AdapterArguments
from unlabeled.hub import logits
from unlabeled.modeling import adapter_base, load_for_tuning, reload

folder = sys.argv[1]
ids = torch.tensor([[20, 21, 22, 23]])
def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0]

merge(Path(folder), Path("merged"))
found = {
    "transformers": outputs(AutoModelForCausalLM.from_pretrained(folder)),
    "pipeline": outputs(pipeline("text-generation", model=folder, device="cpu").model),
    "peft": outputs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder)),
    "reload": outputs(reload(AutoModelForCausalLM, folder)),
    "generate": outputs(load_folder(folder, "cpu")[0]),
    "trained on": outputs(load_for_tuning(AdapterArguments(model_name_or_path=folder, adapter="lora", lora_r=4))),
    "merged": outputs(AutoModelForCausalLM.from_pretrained("merged")),
}
expected = found["reload"]
print(json.dumps({name: float((value - expected).abs().max()) for name, value in found.items()}))
logits(folder)
for attempt in (AutoPeftModelForCausalLM.from_pretrained, lambda name: AutoModelForCausalLM.from_pretrained("./base")):
    try:
        attempt(folder)
    except Exception as error:
        print(type(error).__name__)
"""


def test_own_base_is_never_asked_of_the_hub(adapters, tmp_path):
    """Moved, its first base gone, from another working directory, with a Hub on which strangers own such names."""
    shutil.copytree(adapters("sft"), tmp_path / "mylora", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "elsewhere").mkdir()
    with HubServer() as hub:
        for name in ("mylora/base", "base/base", "sft/base"):
            hub.create(name)
        done = subprocess.run(
            [sys.executable, "-c", READERS, str(tmp_path / "mylora"), str(ROOT / "scripts")],
            capture_output=True, text=True, cwd=tmp_path / "elsewhere",
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert [request.path for request in hub.requests if "base" in request.path] == []
    *_, differences, first, second = done.stdout.strip().splitlines()
    assert max(json.loads(differences).values()) < 1e-5
    assert (first, second) == ("OSError", "OSError"), "PEFT's own class reads the name as one of the working directory"


def test_base_that_is_gone_is_refused(adapters, work, tmp_path):
    """What earlier versions wrote, a path relative to the working directory, is looked for here and never on the Hub."""
    folder = tmp_path / "mylora"
    shutil.copytree(adapters("sft"), folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = read(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == OWN_BASE_PATH == "./base"
    shutil.move(folder / "base", tmp_path / "away")
    lineage = read(folder / "lineage.json")
    for base, trained_on_a_folder, sentence in (
        ("./base", True, f"the base model of the adapter {folder} is not in {folder / 'base'}; copy it there"),
        ("base", False, "the folder base, is not there; put it back"),
        ("mylora/base", False, "the folder mylora/base, is not there; put it back"),
        ("outputs/llama", True, "the folder outputs/llama, is not there; put it back"),
        ("/gone/llama", False, "the folder /gone/llama, is not there; put it back"),
        ("org/llama", False, None),
    ):
        parent = {"name_or_path": base} | ({"weights": {"model.safetensors": "0"}} if trained_on_a_folder else {})
        (folder / "lineage.json").write_text(json.dumps(lineage | {"parent": parent}))
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        if sentence:
            with pytest.raises(UserError, match=re.escape(sentence)):
                adapter_base(str(folder))
        else:
            assert adapter_base(str(folder)) == base, "a name of the Hub"
