"""The models of the loops: a plain GPT-2, and those of transformers."""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.gpu.bench import IGNORE, Shape


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        query, key, value = (
            part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm_2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    """A GPT-2 as in nanoGPT: whole rows, causal attention, all logits, and the loss inside the compiled graph."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def hugging_face_model(kind: str, shape: Shape, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A float32 GPT-2 or ModernBERT of this size.

    Args:
        kind: "gpt2" or "modernbert".
    """
    torch.manual_seed(0)
    ids = {"vocab_size": shape.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if kind == "gpt2":
        sizes = {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads, "n_positions": shape.length}
        sizes |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = AutoConfig.for_model("gpt2", **ids, **sizes)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    else:
        full = shape.layers == Shape.layers
        sizes = {} if full else {"hidden_size": shape.width, "intermediate_size": 2 * shape.width}
        sizes |= {} if full else {"num_hidden_layers": 4, "num_attention_heads": shape.heads}
        ids |= {"cls_token_id": 0, "sep_token_id": 0}
        config = AutoConfig.for_model("modernbert", **ids, **sizes)
        model = AutoModelForMaskedLM.from_config(config, trust_remote_code=False, **options)
    model.config.use_cache = False
    return model


def numbered_tokens(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `vocabulary` tokens, of which the first three are end, padding and mask."""
    names = ["<eos>", "<pad>", "<mask>", *(f"t{index}" for index in range(3, vocabulary))]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<eos>"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
