"""Conversations: chat templates, which of their tokens are learned, and what a trained model answers."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from trl import extract_prompt

from unlabeled import UserError
from unlabeled.corpus import Source, check_held_out, identity, read_examples, unit_hash
from unlabeled.data.files import skipped_files
from unlabeled.data.identity import fingerprint
from unlabeled.tokenization import add_special_tokens, encode_batch, framing, tokenizer_fingerprint

SHIPPED = "recipes/templates/chatml.jinja"


def set_chat_template(tokenizer, path: str | None) -> list[str]:
    """Give the tokenizer a chat template whose generation markers say what is learned, and every token it writes.

    Args:
        path: a .jinja file; None for the tokenizer's own.

    Returns:
        The tokens that are new to the tokenizer, for which the embeddings have to grow.

    Raises:
        UserError: there is no template, it marks nothing as learned, or not the token that ends a turn.
    """
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8").rstrip("\n")
        except OSError as error:
            raise UserError(f"chat_template: cannot read {path} ({error.strerror}); {SHIPPED} is one") from error
    where = path or f"the tokenizer {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise UserError(f"{where} has no chat template; set chat_template, for example to {SHIPPED}")
    if not re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template):
        raise UserError(
            f"the chat template of {where} does not mark what the assistant says with {{% generation %}}, so nothing "
            f"would be learned; set chat_template to a file that does, for example {SHIPPED}"
        )
    known = tokenizer.get_vocab()
    written = dict.fromkeys(re.findall(r"<\|\w+\|>", tokenizer.chat_template))  # in order, each once
    # `bos_token != '<|im_start|>'` and the like mention tokens that this tokenizer need not have: render to be sure.
    sample = tokenizer.apply_chat_template(PROBE, tokenize=False)
    new = [token for token in written if token not in known and token in sample]
    add_special_tokens(tokenizer, {"additional_special_tokens": new})
    end = end_of_turn(tokenizer)
    if end not in tokenizer.all_special_ids:
        raise UserError(
            f"the chat template of {where} does not teach where a turn ends (the last learned token is "
            f"{tokenizer.decode([end])!r}); move the token that ends it before {{% endgeneration %}}"
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # what stops `generate`
    return new


PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def end_of_turn(tokenizer) -> int:
    """The id of the last token that is learned of an answer."""
    ids, targets = _template(tokenizer, PROBE)
    return int(ids[np.flatnonzero(targets)[-1]]) if targets.any() else -1


def stop_at_end_of_turn(model, tokenizer) -> bool:
    """Make the model stop where the tokenizer's chat template ends a turn, and where it did; True when that is new."""
    before = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *([before] if isinstance(before, int) else before or [])}
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    return model.generation_config.eos_token_id != before


@dataclass(frozen=True)
class Conversation:
    """A tokenised example: ids int32 (n,), targets bool (n,), and the UTF-8 bytes of what is learned."""

    ids: np.ndarray
    targets: np.ndarray
    target_bytes: int


def read_conversations(source: Source, tokenizer) -> Iterator[Conversation | None]:
    """The examples of a source: `messages`, or `prompt` and `completion`, each as text or as messages.

    Messages go through the chat template; what its generation markers enclose is learned, of a `completion` only.
    Plain text stands between bos and eos, prompt and completion are tokenised apart, and the completion with its eos is
    learned. None stands for an example that writes a special token of the tokenizer: it could end its own turn.

    Raises:
        UserError: naming file and row, for an example that is none of these.
    """
    names = _special_names(tokenizer)
    for number, (where, row) in enumerate(read_examples(source)):
        prompt, answer = (row.get("messages"), []) if "messages" in row else (row.get("prompt"), row.get("completion"))
        place = f"row {number} of {where}"
        if isinstance(prompt, str) and isinstance(answer, str):
            frame = framing(tokenizer, "clm")  # a special token that is written out is encoded as its characters here
            asked, learned = encode_batch(tokenizer, [prompt, answer])
            ids = np.concatenate([[frame.prefix_id], asked, learned, [frame.suffix_id]]).astype(np.int32)
            yield Conversation(ids, np.arange(len(ids)) > len(asked), len(answer.encode()))
            continue
        prompt, answer = _messages(prompt, place), _messages(answer, place)
        if any(names.search(message["content"]) for message in prompt + answer):
            yield None
            continue
        ids, targets = _template(tokenizer, prompt + answer, place)
        learned = answer or prompt
        if answer:
            targets &= np.arange(len(ids)) >= len(_template(tokenizer, prompt, place, add_generation_prompt=True)[0])
        size = sum(len(message["content"].encode()) for message in learned if message["role"] == "assistant")
        yield Conversation(ids, targets, size)


def prepare_pairs(
    train: list[Source], evaluation: list[Source], tokenizer, max_length: int, eval_fraction: float = 0.0
):
    """Preferences for `DPOTrainer`: ({"train": Dataset, "validation": Dataset}, manifest).

    Columns: `prompt`, `chosen` and `rejected` as messages, and `tokens`, of prompt and answer, twice. A text becomes a
    message: the prompt of the user, the answers of the assistant. Pairs of which an answer does not fit into
    `max_length` with its prompt are left out and counted, as are those that write a special token.

    Raises:
        UserError: no pairs, or naming file and row, one without prompt, chosen or rejected.
    """
    from datasets import Dataset, disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # TRL will draw four
    pairs: dict[str, list[dict]] = {"train": [], "validation": []}
    left_out: dict[str, Counter] = {split: Counter() for split in pairs}
    for given, sources in (("train", train), ("validation", evaluation)):
        for pair in (pair for source in sources for pair in _read_pairs(source, tokenizer)):
            # By prompt, so that all answers to one end on the same side.
            split = "validation" if unit_hash(json.dumps(pair["prompt"]).encode()) < eval_fraction else given
            if not pair["tokens"]:
                left_out[split]["a special token in the text"] += 1
            elif max(pair["tokens"]) > max_length:
                left_out[split]["longer than max_length"] += 1
            else:
                pairs[split].append(pair | {"tokens": sum(pair["tokens"])})
    check_held_out(eval_fraction, len(pairs["train"]), len(pairs["validation"]), "pairs")
    for split, key in (("train", "train_data"), ("validation", "eval_data")):
        if not pairs[split]:
            raise UserError(f"{key} has no pair of answers that fits into max_length {max_length}; raise it")
    splits = {
        split: {
            "documents": len(rows),
            "rows": len(rows),
            "text_tokens": sum(row["tokens"] for row in rows),
            "bytes": sum(len(row[key][-1]["content"].encode()) for row in rows for key in ("chosen", "rejected")),
            "left_out": dict(left_out[split]),
        }
        for split, rows in pairs.items()
    }
    plan = {
        "objective": "dpo",
        "max_length": max_length,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": tokenizer.chat_template,
        "train": [identity(source) for source in train],
        "evaluation": [identity(source) for source in evaluation],
        "eval_fraction": eval_fraction,
    }
    rows = {split: Dataset.from_list(pairs[split]) for split in pairs}
    skipped = skipped_files([*train, *evaluation])
    return rows, plan | {"fingerprint": fingerprint(plan), "splits": splits, "skipped_files": skipped}


def _read_pairs(source: Source, tokenizer) -> Iterator[dict]:
    """Pairs with `tokens`, those of either answer with its prompt; none for a pair that writes a special token."""
    names = _special_names(tokenizer)
    for number, (where, row) in enumerate(read_examples(source)):
        place, pair = f"row {number} of {where}", {}
        if "prompt" not in row and row.get("chosen") and row.get("rejected"):
            row = extract_prompt(row)  # what both conversations begin with
        for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            value = row.get(key)
            if not value:
                raise UserError(f"{place} has no {key}; preferences need prompt, chosen and rejected")
            pair[key] = _messages([{"role": role, "content": value}] if isinstance(value, str) else value, place)
        answers = [pair["prompt"] + pair[key] for key in ("chosen", "rejected")]
        special = any(names.search(message["content"]) for answer in answers for message in answer)
        yield pair | {"tokens": [] if special else [len(_template(tokenizer, one, place)[0]) for one in answers]}


def first_prompts(sources: list[Source], count: int = 3) -> list[str]:
    """What the user says first in the first examples of the sources, each once, to show what a model answers."""
    prompts: list[str] = []
    for _, row in (example for source in sources for example in read_examples(source)):
        asked = row.get("messages") or row.get("prompt") or row["chosen"]
        said = [message["content"] for message in asked if message["role"] == "user"] if isinstance(asked, list) else []
        prompt = said[0] if said else str(asked)
        if prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts


def _special_names(tokenizer) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))


def _messages(value, place: str) -> list[dict]:
    if value is None:
        value = []
    fine = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )
    if not fine:
        raise UserError(
            f"{place} is no conversation; give it `messages` (each with role and content), or `prompt` and `completion`"
        )
    return value


def _template(tokenizer, messages: list[dict], place: str = "", **options) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of messages, as the chat template writes and marks them."""
    if not messages:
        raise UserError(f"{place} is no conversation; give it `messages`, or `prompt` and `completion`")
    try:
        done = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    except Exception as error:  # templates raise what they like, for example over the order of the roles
        raise UserError(f"{place} does not fit the chat template ({error}); correct it or leave it out") from error
    return np.array(done["input_ids"], dtype=np.int32), np.array(done["assistant_masks"], dtype=bool)


def show_targets(tokenizer, row: dict) -> str:
    """The first conversation of a prepared row, with what is learned in green, or between » « without a terminal."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("»", "«")
    length = row["lengths"][0]
    ids, targets = np.asarray(row["input_ids"][:length]), np.asarray(row["targets"][:length], dtype=bool)
    cuts = [0, *(np.flatnonzero(targets[1:] != targets[:-1]) + 1), len(ids)]
    parts = [tokenizer.decode(ids[start:end]) for start, end in pairwise(cuts)]
    return "".join(on + text + off if targets[start] else text for start, text in zip(cuts, parts, strict=False))


@torch.no_grad()
def reply(
    model, tokenizer, prompt: str | list[dict], max_new_tokens: int = 100, sample: bool = False, seed: int = 0
) -> str:
    """The model's answer where the tokenizer has a chat template, else its continuation of the text.

    Greedy, or with `sample` drawn at temperature 0.8 and top-p 0.95 with the given seed. `prompt` may be the messages
    of a conversation. Of one that leaves no room in the model's positions the end is read.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = [start, *encode_batch(tokenizer, [prompt])[0].tolist()]
    if positions := getattr(model.config, "max_position_embeddings", None):
        max_new_tokens = min(max_new_tokens, max(positions - len(ids), positions // 4))
        ids = ids[-(positions - max_new_tokens) :]
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sample else {"do_sample": False}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    start = torch.tensor([ids], device=model.device)
    output = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, **how,
    )  # fmt: skip
    torch.set_rng_state(state)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def compare_replies(prompts: list[str], before, after, tokenizer) -> str:
    """Markdown: what two models answer to the same prompts, greedily."""
    lines = ["Greedy answers to the first held-out prompts, before and after this stage.", ""]
    for prompt in prompts:
        for heading, text in (
            ("Prompt", prompt),
            ("Before", reply(before, tokenizer, prompt, 60)),
            ("After", reply(after, tokenizer, prompt, 60)),
        ):
            lines += [f"**{heading}**", "", *(f"    {line}" for line in text.splitlines() or [""]), ""]
        lines += ["---", ""]
    return "\n".join(lines)
