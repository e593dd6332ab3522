"""Programs in model folders and checkpoints are never run: modules, pickles, kernels and templates."""

import ast
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODELS, ROOT, make_text, recipe_arguments, run_recipe
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from unlabeled import UserError
from unlabeled.config import AdapterArguments, ModelArguments
from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.hub import push as hub
from unlabeled.models.configs import load_config
from unlabeled.models.exports import load_and_check_export
from unlabeled.models.generation import generate_tokens, load_for_generation
from unlabeled.models.loading import load_pretrained
from unlabeled.models.tuning import load_for_tuning
from unlabeled.planner.outline import outline_model
from unlabeled.planner.recipe_config import read_recipe_config
from unlabeled.runtime.checkpoints import MANIFEST, find_checkpoints
from unlabeled.runtime.safe_loading import check_checkpoint
from unlabeled.training.merging import merge_adapter

CHATML = ROOT / "recipes" / "templates" / "chatml.jinja"


@pytest.fixture
def marker(tmp_path) -> Path:
    """The folder that a hostile program of these tests creates."""
    return tmp_path / "a program ran"


@pytest.fixture(autouse=True)
def consent(monkeypatch, marker):
    """Standard input answers yes to all questions; afterwards no program has run."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
    yield
    assert not marker.exists()


@pytest.fixture(scope="module")
def harmless(tokenizers, tmp_path_factory) -> dict[str, Path]:
    """Folders of an untrained "llama" and "bert", and of an "adapter" for that llama."""
    folders = {name: tmp_path_factory.mktemp("models") / name for name in ("llama", "bert", "adapter")}
    for name, auto_class in (("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)):
        tokenizer = load_tokenizer(tokenizers["clm" if name == "llama" else "mlm"])
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "eos", "bos")}
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **ids, **MODELS[name])
        model = auto_class.from_config(config)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
        if name == "llama":
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
            adapted.peft_config["default"].base_model_name_or_path = str(folders[name])
            adapted.save_pretrained(folders["adapter"])
            tokenizer.save_pretrained(folders["adapter"])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight examples for each kind of task."""
    folder = tmp_path_factory.mktemp("data")
    question, answer = {"role": "user", "content": "who"}, {"role": "assistant", "content": "they"}
    rejected = {"role": "assistant", "content": "no"}
    texts = make_text(8, 0, low=6, high=9)
    rows = {
        "sft": [{"messages": [question, answer]}] * 8,
        "dpo": [{"prompt": [question], "chosen": [answer], "rejected": [rejected]}] * 8,
        "classify": [{"text": text, "label": label} for text, label in zip(texts, ["early", "late"] * 4, strict=True)],
        "tag": [{"tokens": ["who", "is"], "ner_tags": ["O", "B-LOC"]}] * 8,
        "embed": [{"anchor": text[:9], "positive": text[9:]} for text in texts],
    }
    for name, examples in rows.items():
        lines = "".join(f"{json.dumps(example)}\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def change_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def write_module(folder: Path, marker: Path, names: list[str], name: str = "evil.py") -> None:
    """Write a Python module that creates the marker when it is imported."""
    classes = "".join(f"class {name}:\n    pass\n" for name in names)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n{classes}", encoding="utf-8")


HEADS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification")
AUTO_MAP = dict.fromkeys(("AutoConfig", "AutoModel", *(f"AutoModelFor{head}" for head in HEADS)), "evil.Evil")


def add_auto_map(folder: Path, marker: Path, **changes) -> None:
    write_module(folder, marker, ["Evil"])
    change_json(folder / "config.json", auto_map=AUTO_MAP, **changes)


class Program:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_pickle(file: Path, marker: Path, zipped: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(2), "state": Program(marker)}, file, _use_new_zipfile_serialization=zipped)


# --- Every command that takes a model ---------------------------------------------------------------------------------


def tune(recipe: str, folder: Path, data: Path, out: Path, **options) -> None:
    budget = {"sft": "tokens", "dpo": "pairs", "embed": "pairs"}.get(recipe, "examples")
    amount = 256 if recipe == "sft" else 8
    options = {
        "model_name_or_path": folder,
        "train_data": data / f"{recipe}.jsonl",
        "eval_data": data / f"{recipe}.jsonl",
        "output_dir": out / "run",
        f"train_{budget}": amount,
        f"batch_{budget}": amount,
        "max_length": 32,
        "per_device_train_batch_size": 8,
        "precision": "fp32",
        "use_cpu": "true",
    } | options
    options |= {"prepared_dir": out / "prepared", "chat_template": CHATML} if recipe in ("sft", "dpo") else {}
    options |= {"text_column": "tokens", "label_column": "ner_tags"} if recipe == "tag" else {}
    run_recipe(recipe, [word for key, value in options.items() for word in (f"--{key}", str(value))])


def continue_pretraining(recipe: str, folder: Path, data: Path, out: Path) -> None:
    (out / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(20, 0)))
    corpus = dict.fromkeys(("train", "validation"), str(out / "text.jsonl"))
    words = recipe_arguments("clm", "llama", corpus, {"clm": ""}, out / "run", model_name_or_path=folder)
    settings = dict(zip(words[::2], words[1::2], strict=True))
    settings |= {"--train_tokens": "256", "--prepared_dir": str(out / "prepared")}
    scratch = ("--model_type", "--config_overrides", "--tokenizer_name_or_path")
    run_recipe(recipe, [word for key, value in settings.items() if key not in scratch for word in (key, value)])


def plan(folder: Path, data: Path, out: Path) -> None:
    config = {"model_name_or_path": str(folder), "train_data": str(data / "sft.jsonl"), "output_dir": "run"}
    config |= {
        "train_tokens": 1024,
        "batch_tokens": 256,
        "max_length": 32,
        "eval_fraction": 0.1,
        "chat_template": str(CHATML),
    }
    (out / "sft.yaml").write_text(json.dumps(config), encoding="utf-8")
    recipe, settings = read_recipe_config(str(out / "sft.yaml"), "sft")
    outline_model(recipe, settings, labels=2)


COMMANDS = {
    "pretrain_clm": lambda folder, data, out: continue_pretraining("pretrain_clm", folder, data, out),
    "sft": lambda folder, data, out: tune("sft", folder, data, out),
    "sft lora": lambda folder, data, out: tune("sft", folder, data, out, adapter="lora"),
    "dpo": lambda folder, data, out: tune("dpo", folder, data, out),
    "classify": lambda folder, data, out: tune("classify", folder, data, out),
    "tag": lambda folder, data, out: tune("tag", folder, data, out),
    "embed": lambda folder, data, out: tune("embed", folder, data, out),
    "generate and evaluate": lambda folder, data, out: load_for_generation(str(folder)),
    "plan": plan,
    "push": lambda folder, data, out: hub.push(folder, "name/repo", dry_run=True),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_architecture_in_folder(command, harmless, data, marker, tmp_path):
    """Refused by every recipe and script that takes a model, without a question."""
    masked = command in ("classify", "tag", "embed")
    folder = copy_of(harmless["bert" if masked else "llama"], tmp_path / "foreign")
    add_auto_map(folder, marker, model_type="evil")
    with pytest.raises(UserError, match=r"model_type 'evil' of .* is a program in that folder, which is not run"):
        COMMANDS[command](folder, data, tmp_path)


@pytest.mark.slow
def test_no_question_on_standard_input(harmless, marker, tmp_path):
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    add_auto_map(folder, marker, model_type="evil")
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), str(folder), "who is he"]
    done = subprocess.run(command, input="y\n" * 1000, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_adapter_of_architecture_in_folder(harmless, marker, tmp_path):
    base, folder = copy_of(harmless["llama"], tmp_path / "base"), copy_of(harmless["adapter"], tmp_path / "adapter")
    add_auto_map(base, marker, model_type="evil")
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    args = AdapterArguments(model_name_or_path=str(folder), adapter="lora")
    loading = {
        "tune": lambda: load_for_tuning(args),
        "generate": lambda: load_for_generation(str(folder)),
        "merge": lambda: merge_adapter(folder, tmp_path / "merged"),
        "push": lambda: hub.compute_probe_logits(str(folder)),
    }
    for load in loading.values():
        with pytest.raises(UserError, match=r"model_type 'evil' of .* is a program in that folder"):
            load()


def test_adapter_with_tokenizer_or_model(harmless, marker, tmp_path):
    """PEFT reads those of prompt tuning and of shadow adapters without `trust_remote_code=False`."""
    tokenizer = copy_of(harmless["llama"], tmp_path / "tokenizer")
    write_module(tokenizer, marker, ["Evil"])
    (tokenizer / "config.json").unlink()
    names = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change_json(tokenizer / "tokenizer_config.json", **names)
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="who",
        tokenizer_name_or_path=str(harmless["llama"]),
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(harmless["llama"]), prompt)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(str(harmless["llama"])).save_pretrained(tmp_path / "adapter")
    names = {"base_model_name_or_path": str(harmless["llama"]), "tokenizer_name_or_path": str(tokenizer)}
    change_json(tmp_path / "adapter" / "adapter_config.json", **names, inference_mode=False)
    folder = str(tmp_path / "adapter")
    args = AdapterArguments(model_name_or_path=folder, adapter="lora")
    for load in (
        lambda: load_for_tuning(args),
        lambda: load_for_generation(folder),
        lambda: hub.compute_probe_logits(folder),
    ):
        with pytest.raises(UserError, match=r"is an adapter of type PROMPT_TUNING, and only LORA is supported"):
            load()


def test_tokenizer_class_in_folder(harmless, marker, tmp_path):
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    write_module(folder, marker, ["Evil"])
    (folder / "config.json").unlink()
    change_json(
        folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    )
    with pytest.raises(UserError, match=r"no tokenizer in .*contains custom code"):
        load_tokenizer(str(folder))


def test_built_in_architecture_with_auto_map(harmless, marker, tmp_path):
    """Where the folder names modules besides, such as for versions of transformers from before it was built in."""
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    add_auto_map(folder, marker)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    write_module(folder, marker, ["generate"], "custom_generate/generate.py")
    models = [
        load_pretrained(AutoModelForCausalLM, str(folder), "sdpa"),
        load_for_tuning(AdapterArguments(model_name_or_path=str(folder), adapter="none")),
        load_and_check_export(AutoModelForCausalLM, str(folder)),
        load_for_generation(str(folder))[0],
    ]
    for loaded in (*models, load_config(str(folder)), load_tokenizer(str(folder))):
        assert type(loaded).__module__.startswith("transformers.")
    assert len(generate_tokens(models[-1], load_tokenizer(str(folder)), [5, 6, 7], max_new_tokens=2)) <= 2
    assert hub.compute_probe_logits(str(folder)).shape[0] == 1


def test_head_in_folder(harmless, marker, tmp_path):
    """Of an architecture that is built in, but not with this head."""
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    add_auto_map(folder, marker)
    with pytest.raises(UserError, match=r"cannot be loaded \(The repository .* contains custom code"):
        load_pretrained(AutoModelForMaskedLM, str(folder), "sdpa")


def test_attention_kernel(harmless, tmp_path):
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    change_json(folder / "config.json", attn_implementation="somebody/attention")
    for load in (lambda: load_config(str(folder)), lambda: load_and_check_export(AutoModelForCausalLM, str(folder))):
        with pytest.raises(UserError, match=r"takes its attention from somebody/attention, a program of the Hub"):
            load()
    for arguments in (ModelArguments, AdapterArguments):
        with pytest.raises(UserError, match=r"attn_implementation: 'kernels-community/flash-attn' is a program of the"):
            arguments(model_name_or_path="model", attn_implementation="kernels-community/flash-attn")


def test_sentence_transformer_modules(harmless, data, marker, tmp_path):
    folder = embedder(harmless, tmp_path)
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[1]["type"] = "evil.Evil"
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    write_module(folder, marker, ["Evil"])
    with pytest.raises(UserError, match=r"modules.json names evil.Evil, a program that is not part of"):
        tune("embed", folder, data, tmp_path)
    folder = embedder(harmless, tmp_path / "dense")
    write_module(folder, marker, ["Evil"])
    change_json(folder / "2_Dense" / "config.json", activation_function="evil.Evil")
    with pytest.raises(UserError, match=r"names the activation function evil.Evil, a program"):
        tune("embed", folder, data, tmp_path)


def embedder(harmless: dict[str, Path], out: Path) -> Path:
    """A folder of sentence-transformers with a layer of its own behind the pooling."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(harmless["bert"]), device="cpu")
    width = MODELS["bert"]["hidden_size"]
    model = SentenceTransformer(modules=[model[0], Pooling(width), Dense(width, 8)], device="cpu")
    model.save(str(out / "embedder"), create_model_card=False)
    return out / "embedder"


def test_chat_template_sandbox(harmless, marker):
    tokenizer = load_tokenizer(str(harmless["llama"]))
    tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(marker)) + ") }}"
    with pytest.raises(UserError, match=r"chat template"):
        set_chat_template(tokenizer, None)


def test_data_script(marker, tmp_path):
    write_module(tmp_path, marker, ["Data"], "data/data.py")
    for path in ("data", "data/data.py"):
        with pytest.raises(UserError):
            list(read_documents(Source(str(tmp_path / path))))


# --- Pickles in the place of weights ----------------------------------------------------------------------------------


def only_a_pickle(folder: Path, marker: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model.bin", marker, zipped)


def sharded_pickle(folder: Path, marker: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model-00001-of-00001.bin", marker, zipped)
    weights = {"weight": "pytorch_model-00001-of-00001.bin"}
    change_json(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=weights)


def index_of_a_pickle(folder: Path, marker: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "part.bin", marker, zipped)
    change_json(folder / "model.safetensors.index.json", metadata={}, weight_map={"weight": "part.bin"})


def renamed_pickle(folder: Path, marker: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "model.safetensors", marker, zipped)


REFUSED = "pickle, which may run a program|which is no .safetensors file|cannot be loaded|does not load"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", [only_a_pickle, sharded_pickle, index_of_a_pickle, renamed_pickle])
def test_pickled_weights(form, zipped, harmless, marker, tmp_path):
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    form(folder, marker, zipped)
    adapter = copy_of(harmless["adapter"], tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
    for path in (folder, adapter):
        args = AdapterArguments(model_name_or_path=str(path), adapter="lora")
        for load in (
            lambda args=args: load_for_tuning(args),
            lambda path=path: load_for_generation(str(path)),
            lambda path=path: hub.compute_probe_logits(str(path)),
        ):
            with pytest.raises(UserError, match=REFUSED) as refusal:
                load()
            assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=REFUSED):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_adapter(zipped, harmless, data, marker, tmp_path):
    folder = copy_of(harmless["adapter"], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    write_pickle(folder / "adapter_model.bin", marker, zipped)
    commands = {name: COMMANDS[name] for name in ("sft", "sft lora", "dpo", "generate and evaluate")}
    commands["merge"] = lambda folder, data, out: merge_adapter(folder, out / "merged")
    commands["push"] = lambda folder, data, out: hub.compute_probe_logits(str(folder))
    for command in commands.values():
        with pytest.raises(UserError, match=r"adapter_model.bin is a pickle, which may run a program"):
            command(folder, data, tmp_path)


def test_harmless_pickle(harmless, tmp_path):
    """Nobody can tell by the name which ones are harmless."""
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loading = (
        lambda: load_pretrained(AutoModelForCausalLM, str(folder), "sdpa"),
        lambda: load_for_generation(str(folder)),
        lambda: hub.compute_probe_logits(str(folder)),
    )
    for load in loading:
        with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle"):
            load()


@pytest.mark.parametrize("part", ["", "2_Dense"])
def test_pickled_embedder(part, harmless, data, marker, tmp_path):
    folder = embedder(harmless, tmp_path)
    (folder / part / "model.safetensors").unlink()
    write_pickle(folder / part / "pytorch_model.bin", marker)
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle"):
        tune("embed", folder, data, tmp_path)


def test_pickles_beside_weights(harmless, marker, tmp_path):
    folder = copy_of(harmless["llama"], tmp_path / "foreign")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        write_pickle(folder / name, marker)
    load_pretrained(AutoModelForCausalLM, str(folder), "sdpa")
    load_for_generation(str(folder))
    assert hub.compute_probe_logits(str(folder)).shape[0] == 1


# --- Pickles in a checkpoint ------------------------------------------------------------------------------------------

STATES = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_1.pth",
    "training_args.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
    "global_step4/mp_rank_00_model_states.pt",
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)


@pytest.fixture(scope="module")
def unfinished(corpus, tokenizers, tmp_path_factory):
    """The arguments of a run, and its folder with a checkpoint that the same arguments resume from."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    words = recipe_arguments("clm", "llama", corpus, tokenizers, folder, save_steps=2)
    run_recipe("pretrain_clm", words)
    (folder / "metrics.json").unlink()
    return words, folder


def commit(checkpoint: Path) -> None:
    """Write a manifest with the hashes of all files, as an attacker would after changing some of them."""
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != MANIFEST]
    entries = {
        str(file.relative_to(checkpoint)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    (checkpoint / MANIFEST).write_text(json.dumps(entries), encoding="utf-8")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", STATES)
def test_program_in_checkpoint(name, zipped, unfinished, marker, tmp_path):
    checkpoint = copy_of(Path(find_checkpoints(str(unfinished[1]))[0]), tmp_path / "checkpoint-4")
    check_checkpoint(checkpoint)
    write_pickle(checkpoint / name, marker, zipped)
    reason = "would run posix.mkdir when it is read" if zipped else "is no state of a training run"
    with pytest.raises(UserError, match=f"{name} {reason}"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "global_step4/mp_rank_00_model_states.pt"])
def test_program_in_checkpoint_before_resume(name, unfinished, marker, tmp_path):
    """The manifest has the right hash, as whoever writes a file can write the manifest too."""
    words, folder = unfinished
    run = copy_of(folder, tmp_path / "run")
    checkpoint = Path(find_checkpoints(str(run))[0])
    write_pickle(checkpoint / name, marker)
    commit(checkpoint)
    words = [str(run) if word == str(folder) else word for word in words]
    with pytest.raises(UserError, match=r"would run posix.mkdir when it is read"):
        run_recipe("pretrain_clm", words)


def test_deepspeed_checkpoint(unfinished, tmp_path):
    """The objects that states of ZeRO-2 and ZeRO-3 hold besides tensors, each under the name that it is pickled by."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "loss_scaler": [
            LossScaler(1.0),
            DynamicLossScaler(
                init_scale=2.0, scale_window=100, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
            ),
        ],
        "zero_stage": ZeroStageEnum.weights,
        "param_slice_mappings": {"weight": fragment_address(numel=1, start=0)},
    }
    checkpoint = copy_of(Path(find_checkpoints(str(unfinished[1]))[0]), tmp_path / "checkpoint-4")
    (checkpoint / "global_step4").mkdir()
    torch.save(state, checkpoint / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    check_checkpoint(checkpoint)


def test_deepspeed_checkpoint_elsewhere(unfinished, tmp_path):
    """DeepSpeed reads the folder that `latest` names, which was not checked."""
    checkpoint = copy_of(Path(find_checkpoints(str(unfinished[1]))[0]), tmp_path / "checkpoint-4")
    (checkpoint / "latest").write_text("global_step4\n")
    check_checkpoint(checkpoint)
    for name in ("../elsewhere", "/elsewhere", ".."):
        (checkpoint / "latest").write_text(name)
        with pytest.raises(UserError, match=r"latest names .* which is no folder of this checkpoint"):
            check_checkpoint(checkpoint)


# --- The source -------------------------------------------------------------------------------------------------------

FOLDERS = ("unlabeled", "recipes", "scripts", "experiments", "benchmarks")
# Functions that take the argument. Those of PEFT and `datasets` do not: they never run a module of a folder.
LOADING = ("from_pretrained", "from_config", "SentenceTransformer", "CrossEncoder", "pipeline")
WITHOUT = ("PeftModel", "PeftConfig")


def called_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def value_of(call: ast.Call, name: str):
    return next((ast.literal_eval(word.value) for word in call.keywords if word.arg == name), None)


def test_loading_calls():
    seen = 0
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for call in calls_of(path):
            owner = getattr(getattr(call.func, "value", None), "id", None)
            if called_name(call) in LOADING and owner not in WITHOUT:
                assert value_of(call, "trust_remote_code") is False, f"{path}:{call.lineno}"
                seen += 1
    assert seen > 25


def test_unpickling_calls():
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for call in calls_of(path):
            owner, name = getattr(getattr(call.func, "value", None), "id", None), called_name(call)
            where = f"{path}:{call.lineno}"
            if (owner, name) == ("torch", "load"):
                assert value_of(call, "weights_only") is True, where
            assert owner not in ("pickle", "dill", "cloudpickle", "joblib") or name not in ("load", "loads"), where
            assert not value_of(call, "allow_pickle"), where
            assert owner != "yaml" or name not in ("load", "full_load", "unsafe_load"), where
