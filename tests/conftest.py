"""What many tests share: a small corpus, small tokenizers and models, and recipes that run in the test process."""

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many test processes as cores

ROOT = Path(__file__).resolve().parent.parent

# Two layers of each tested architecture, without dropout, so that equal batches give equal results.
MODELS = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "bert": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "modernbert": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "local_attention": 16,
    },
    "eurobert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip
CAUSAL = ("llama", "qwen3", "gpt2")
MASKED = ("bert", "modernbert", "eurobert")
# Encoder-decoders, for span corruption.
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
SPAN_MODELS = {"t5": _T5, "umt5": _T5 | {"feed_forward_proj": "gated-gelu"}}

WORDS = """
the of and to a in that is was he for it with as his on be at by I this had not are but from or have an they which one
you were her all she there would their we him been has when who will more no if out so said what up its about into
than them can only other new some could time these two may then do first any my now such like our over man me even
most made after also did many before must through years where much your way well down should because each just those
people how too little state good very make world still own see men work long get here between both life being under
never day same another know while last might us great old year off
""".split()  # noqa: SIM905


@pytest.fixture(scope="session", autouse=True)
def no_process_wide_signals() -> Iterator[None]:
    """Scripts that a test runs in this process leave its signal handlers as they are, and do not end it."""
    from unlabeled.runtime import signals

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "start", signals.watch_launcher)
        yield


def make_text(documents: int, seed: int, low: int = 3, high: int = 120) -> list[str]:
    """Random documents with something to learn: a word is followed by the next one of `WORDS` in 80 % of all cases.

    Args:
        low: smallest number of words in a document.
        high: largest number of words, plus 1.
    """
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(documents):
        index = int(rng.integers(len(WORDS)))
        words = []
        for _ in range(int(rng.integers(low, high))):
            continues = rng.random() < 0.8
            index = (index + 1) % len(WORDS) if continues else int(rng.integers(len(WORDS)))
            words.append(WORDS[index])
        texts.append(" ".join(words) + ".")
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{"train": path, "validation": path} of two small .jsonl files."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = {}
    for split, documents, seed in (("train", 400, 0), ("validation", 60, 1)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(documents, seed)))
        paths[split] = str(path)
    return paths


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small tokenizers: {"clm": byte-level BPE, "mlm": WordPiece, "span": Unigram with sentinels}."""
    from unlabeled.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = {"clm": ("bpe", 384), "mlm": ("wordpiece", 256), "span": ("unigram", 256)}
    for objective, (algorithm, size) in kinds.items():
        train_tokenizer(make_text(400, 0), algorithm, size).save_pretrained(folder / objective)
    return {objective: str(folder / objective) for objective in kinds}


# Files with a few long tests, which run first: at the end they would keep one process busy while the other is idle.
LONG_FILES = (
    "test_readme",
    "test_equality",
    "test_chain",
    "test_resume",
    "test_crash_recovery",
    "test_markov",
    "test_multinode",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def position(item: pytest.Item) -> int:
        name = item.path.stem
        return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)

    items.sort(key=position)


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in sockets:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in sockets]


def launch_environment() -> dict[str, str]:
    """The environment of several processes on the CPU.

    All runs share what DeepSpeed compiles, which takes a minute and a half.
    """
    extensions = ROOT / ".cache" / "torch_extensions"
    extensions.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # for ninja
        "TORCH_EXTENSIONS_DIR": str(extensions),
    }


def load_recipe(name: str | Path) -> ModuleType:
    """Import a recipe, by its name or the path of a copy, as a new module."""
    path = name if isinstance(name, Path) else ROOT / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_arguments(
    objective: str,
    model_type: str,
    corpus: dict[str, str],
    tokenizers: dict[str, str],
    output_dir: str | Path,
    **options,
) -> list[str]:
    """The command line of a small run; `options` replace the defaults."""
    options = {
        "model_type": model_type,
        "config_overrides": json.dumps((MODELS | SPAN_MODELS).get(model_type, {})),
        "tokenizer_name_or_path": tokenizers[objective],
        "train_data": corpus["train"],
        "eval_data": corpus["validation"],
        "prepared_dir": str(Path(corpus["train"]).parent / "prepared"),
        "output_dir": str(output_dir),
        "max_length": 32,
        "train_tokens": 4 * 256,
        "batch_tokens": 256,
        "per_device_train_batch_size": 8,
        "precision": "fp32",
        "compile": "false",
        "logging_steps": 1,
        "use_cpu": "true",
    } | options
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def run_recipe(name: str | Path, arguments: list[str]) -> None:
    """Run the `main` of a recipe, see `load_recipe`, in this process."""
    from unlabeled.errors import RunFinished
    from unlabeled.runtime.run_lock import release_output_dirs

    reset_accelerator_state()
    argv = sys.argv
    sys.argv = [str(name), *arguments]
    try:
        load_recipe(name).main()
    except RunFinished:
        pass
    finally:
        sys.argv = argv
        release_output_dirs()


def reset_accelerator_state() -> None:
    """Forget the state of accelerate from an earlier run in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def history(output_dir: str | Path) -> list[dict]:
    """The log history of a finished run, from its last checkpoint."""
    from unlabeled.runtime.checkpoints import find_checkpoints

    newest = find_checkpoints(str(output_dir))[0]
    return json.loads(Path(newest, "trainer_state.json").read_text())["log_history"]


def weights(output_dir: str | Path) -> dict:
    """The tensors of the saved model, by name."""
    from safetensors.torch import load_file

    return load_file(Path(output_dir) / "model.safetensors")
