"""What the benchmarks train: shipped configurations with the demo text, some of them with other sizes."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "bench"
SHAKESPEARE_OPTIONS = (
    "--train_data=data/demo/shakespeare/train.parquet",
    "--eval_data=data/demo/shakespeare/validation.parquet",
    "--eval_fraction=0",
    "--prepared_dir=outputs/bench/prepared",
)
SMALL_BATCH_OPTIONS = (
    "--max_length=256",
    "--batch_tokens=4096",
    "--per_device_train_batch_size=16",
    "--train_tokens=4096000",
)
GPU_BATCH_OPTIONS = ("--batch_tokens=16384", "--per_device_train_batch_size=16", "--train_tokens=163840000")
T5_BASE_SIZES = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
SIZES_7M = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
# The vocabulary of GPT-2. The plays do not have as many tokens, but the speed of a model does not depend on that.
GPT2_VOCABULARY_SIZE = 50304
TOKENIZER_ALGORITHMS = {"clm": "bpe", "mlm": "wordpiece", "span": "unigram"}


@dataclass(frozen=True)
class Setting:
    """A configuration in recipes/configs, with some of its keys replaced."""

    config: str
    steps_per_turn: int
    options: tuple[str, ...] = ()
    config_overrides: dict | None = None  # instead of those of the configuration
    tokenizer_size: int | None = None  # of a tokenizer that is trained for the setting

    @property
    def objective(self) -> str:
        return self.config.split("_")[-1]


SETTINGS = {
    "clm-tiny": Setting("tiny/pretrain_clm", 40),
    "mlm-tiny": Setting("tiny/pretrain_mlm", 40),
    "clm-7m": Setting("tiny/pretrain_clm", 4, SMALL_BATCH_OPTIONS, SIZES_7M | {"tie_word_embeddings": True}, 8192),
    "mlm-7m": Setting("tiny/pretrain_mlm", 4, SMALL_BATCH_OPTIONS, SIZES_7M | {"local_attention": 128}, 8192),
    "clm-124m": Setting(
        "gpt2-124m/pretrain_clm",
        20,
        (*SHAKESPEARE_OPTIONS, *GPU_BATCH_OPTIONS),
        {"vocab_size": GPT2_VOCABULARY_SIZE, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        16384,
    ),
    "mlm-150m": Setting(
        "modernbert-base/pretrain_mlm",
        20,
        (*SHAKESPEARE_OPTIONS, *GPU_BATCH_OPTIONS),
        {"vocab_size": GPT2_VOCABULARY_SIZE},
        16384,
    ),
}


def tokenizer_folder(setting: Setting) -> Path | None:
    """The folder of the tokenizer that is trained for a setting, None if its configuration names one."""
    if setting.tokenizer_size is None:
        return None
    algorithm = TOKENIZER_ALGORITHMS.get(setting.objective, "bpe")
    return FOLDER / f"tokenizer-{algorithm}-{setting.tokenizer_size}"


def make_tokenizer(setting: Setting) -> None:
    """Train the tokenizer of a setting, unless it exists."""
    folder = tokenizer_folder(setting)
    if folder is None or folder.exists():
        return
    algorithm = TOKENIZER_ALGORITHMS.get(setting.objective, "bpe")
    command = [sys.executable, "scripts/train_tokenizer.py", "--output_dir", str(folder)]
    command += ["--algorithm", algorithm, "--vocab_size", str(setting.tokenizer_size)]
    command += ["--data", "data/demo/shakespeare/train.parquet"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
