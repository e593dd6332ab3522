"""The models of the experiment: one start for all arms of a family, and what each costs and writes."""

import json
import math
from pathlib import Path

import pandas as pd
import torch
from run import LENGTH, SIZES, T5_SIZES, TASKS
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    set_seed,
)

from unlabeled.data.packing import Denoiser
from unlabeled.data.readers import read_documents
from unlabeled.data.sources import parse_sources
from unlabeled.data.tokenization import encode_batch, train_tokenizer
from unlabeled.models.configs import scratch_config
from unlabeled.models.loading import init_model
from unlabeled.planning import count_parameters, training_flops_per_token
from unlabeled.runtime.checkpoints import write_json
from unlabeled.training.evaluation import bits_per_byte

VOCABULARY, SENTINELS = 1024, 8
TEXTS, TOKENS = 48, 48  # of these, what is written from left to right


def make_tokenizer(folder: Path, text: list[str]) -> None:
    """One vocabulary for all arms: byte-level pieces, a mask for some and sentinels for others.

    `tokenizer` puts a text between its start and its end, as it stands in rows of causal and masked models;
    `tokenizer-span` ends it only, as T5 does.
    """
    if (folder / "tokenizer-span" / "tokenizer.json").exists():
        return
    texts = (document for source in parse_sources(text, "text") for document in read_documents(source))
    tokenizer = train_tokenizer(texts, "bpe", VOCABULARY)
    sentinels = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    named = {"bos_token": "<|startoftext|>", "mask_token": "<|mask|>", "additional_special_tokens": sentinels}
    tokenizer.add_special_tokens(named)
    frame = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    for name, template in (("tokenizer", f"{frame[0][0]} $A {frame[1][0]}"), ("tokenizer-span", f"$A {frame[1][0]}")):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=frame)
        tokenizer.save_pretrained(folder / name)


def make_labelled(folder: Path, seed: int) -> None:
    """`labelled/TASK/{train,held_out}.parquet`: few labels, drawn anew for each seed, and all that is held out.

    Of similarity: which 24 words of a BBC article go on from these 24.
    """
    for task, (_, _, count, _, _) in TASKS.items():
        place = folder / "labelled" / task
        name = {"topics": "bbc", "sentiment": "rotten_tomatoes", "entities": "conll2003", "similarity": "bbc"}[task]
        parts = {"train": ["train"], "held_out": ["validation", "test"] if name == "bbc" else ["test"]}
        place.mkdir(parents=True, exist_ok=True)
        for part, splits in parts.items():
            rows = pd.concat([pd.read_parquet(f"data/demo/{name}/{split}.parquet") for split in splits])
            if task == "similarity":
                words = rows["text"].str.split()
                words = words[words.str.len() >= 48]
                rows = pd.DataFrame(
                    {"anchor": words.str[:24].str.join(" "), "positive": words.str[24:48].str.join(" ")}
                )
            if part == "train":
                rows = rows.sample(min(count, len(rows)), random_state=seed)
            rows.to_parquet(place / f"{part}.parquet", index=False)


# Encoder and decoder of this family have the same weights under other names, and the same shapes but for one.
NAMES = {"head.dense.": "lm_head.dense.", "head.norm.": "lm_head.norm."}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def starts(folder: Path, seed: int) -> Path:
    """A folder with `masked` and `causal`: the same random weights, to be read to both sides or to one."""
    place = folder / f"seed-{seed}" / "start"
    if not (place / "causal" / "model.safetensors").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
        set_seed(seed)
        encoder = init_model(AutoModelForMaskedLM, scratch_config("modernbert", SIZES, tokenizer, LENGTH), "sdpa")
        decoder = init_model(
            AutoModelForCausalLM, scratch_config("modernbert-decoder", SIZES, tokenizer, LENGTH), "sdpa"
        )
        weights = {}
        for name, tensor in encoder.state_dict().items():
            for there, here in NAMES.items():
                name = name.replace(there, here) if name.startswith(there) else name
            if "Wqkv" in name:
                for projection, part in zip(PROJECTIONS, tensor.chunk(3), strict=True):
                    weights[name.replace("Wqkv", projection)] = part.contiguous()
            else:
                weights[name] = tensor
        decoder.load_state_dict(weights)
        for name, model in (("masked", encoder), ("causal", decoder)):
            model.save_pretrained(place / name)
            tokenizer.save_pretrained(place / name)
    return place


def as_encoder(folder: Path) -> Path:
    """A causal model's weights as a model that reads to both sides, in the folder `as_encoder` inside its own."""
    place = folder / "as_encoder"
    if not (place / "model.safetensors").exists():
        weights, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).state_dict(),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
        encoder = init_model(AutoModelForMaskedLM, scratch_config("modernbert", SIZES, tokenizer, LENGTH), "sdpa")
        found = {}
        for name in encoder.state_dict():
            there = name
            for here, prefix in NAMES.items():
                there = there.replace(here, prefix) if there.startswith(here) else there
            parts = [there.replace("Wqkv", projection) for projection in PROJECTIONS] if "Wqkv" in there else [there]
            found[name] = torch.cat([weights[part] for part in parts])
        encoder.load_state_dict(found)
        encoder.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def inputs_per_token() -> float:
    """Of span corruption: inputs for each token of text."""
    return LENGTH / Denoiser().fitting(LENGTH)[0]


def flops_per_token(folder: Path) -> dict[str, float]:
    """FLOPs to train each arm on a token of text, with an output head that is computed for the targets only.

    The recipes compute it everywhere; for masked models that wastes what this saves.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    config = scratch_config("modernbert", SIZES, tokenizer, LENGTH)
    t5 = scratch_config("t5", T5_SIZES, tokenizer, LENGTH)
    with torch.device("meta"):
        counts = count_parameters(AutoModelForMaskedLM.from_config(config, trust_remote_code=False))
        spans = count_parameters(AutoModelForSeq2SeqLM.from_config(t5, trust_remote_code=False))
    # The decoder's windows are half as wide, a difference of less than a percent here.
    full = training_flops_per_token(config, counts, LENGTH)
    masked = {rate: training_flops_per_token(config, counts, LENGTH, head_share=rate) for rate in (0.15, 0.3)}
    corrupted = training_flops_per_token(t5, spans, LENGTH, Denoiser().fitting(LENGTH)[1]) * inputs_per_token()
    return {"causal": full, "masked .15": masked[0.15], "masked .30": masked[0.3], "causal, then masked": masked[0.3],
            "span corruption": corrupted}  # fmt: skip


@torch.no_grad()
def left_to_right(folder: Path, held_out: Path) -> None:
    """Bits per byte of held-out text, each token predicted from those before it, into `left_to_right.json`.

    A masked model sees them and a mask; an encoder-decoder sees them and a sentinel, and says what the sentinel begins
    with. All are code lengths by the chain rule, so they compare.
    """
    if (folder / "left_to_right.json").exists():
        return
    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    ids = [one[:TOKENS] for one in encode_batch(tokenizer, texts) if len(one) >= TOKENS]
    ids = torch.tensor([one.tolist() for one in ids[:: max(len(ids) // TEXTS, 1)][:TEXTS]])
    size = sum(len(tokenizer.decode(one).encode()) for one in ids)

    def column(token: int) -> torch.Tensor:
        return torch.full((len(ids), 1), token)

    begin, end = column(tokenizer.bos_token_id), column(tokenizer.eos_token_id)
    if kind.endswith("ForCausalLM"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        logits = model(torch.cat([begin, ids], dim=1)).logits[:, :-1]
    else:
        masked = kind.endswith("ForMaskedLM")
        auto_class = AutoModelForMaskedLM if masked else AutoModelForSeq2SeqLM
        model = auto_class.from_pretrained(folder, trust_remote_code=False).eval()
        rows = []
        for place in range(TOKENS):
            if masked:
                inputs = torch.cat([begin, ids[:, :place], column(tokenizer.mask_token_id), end], dim=1)
                rows.append(model(inputs).logits[:, place + 1])
            else:
                sentinel = column(tokenizer.convert_tokens_to_ids("<extra_id_0>"))
                answer = torch.cat([column(model.config.decoder_start_token_id), sentinel], dim=1)
                inputs = torch.cat([ids[:, :place], sentinel, end], dim=1)
                rows.append(model(input_ids=inputs, decoder_input_ids=answer).logits[:, -1])
        logits = torch.stack(rows, dim=1)
    nats = -logits.double().log_softmax(-1).gather(-1, ids[:, :, None]).sum().item()
    assert math.isfinite(nats)
    write_json(
        folder / "left_to_right.json", {"bits_per_byte": bits_per_byte(nats, size), "bytes": size, "texts": len(ids)}
    )
