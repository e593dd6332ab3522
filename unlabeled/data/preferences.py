"""Preferences: a prompt with a chosen and a rejected answer, as tokens for `DPOTrainer`."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast

from unlabeled.data.conversation import Conversation, ConversationError, TokenizedConversation
from unlabeled.data.conversation_tokens import tokenize_rendered
from unlabeled.data.conversations import LeftOut, reason_to_leave_out, render_conversation
from unlabeled.data.files import skipped_files
from unlabeled.data.held_out import check_held_out, unit_hash
from unlabeled.data.identity import fingerprint, identity
from unlabeled.data.left_out import TOO_LONG, describe_lengths, join_reasons
from unlabeled.data.messages import make_conversation, read_messages
from unlabeled.data.readers import read_rows
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.sources import Source
from unlabeled.data.template_rendering import ChatTemplate
from unlabeled.data.tokenization import tokenizer_fingerprint
from unlabeled.errors import UserError

EQUAL_ANSWERS = "chosen and rejected are the same"  # why a pair is left out


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, each as messages, and the row that they come from."""

    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    row: dict


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt and two answers as ids, int32 (tokens,) each.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: the ids.
        prompt_hash: of the messages of the prompt, in [0, 1).
        answer_bytes: UTF-8 bytes of the text of both answers.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    prompt_hash: float
    answer_bytes: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt with each answer."""
        return len(self.prompt_ids) + len(self.chosen_ids), len(self.prompt_ids) + len(self.rejected_ids)


class _PairSplit:
    """The pairs of one split, and those that are left out."""

    def __init__(self) -> None:
        self.pairs: list[TokenizedPair] = []
        self.left_out: Counter[str] = Counter()
        self.too_long: list[int] = []  # tokens of the longer answer with its prompt

    def add(self, pair: TokenizedPair, max_length: int) -> None:
        length = max(pair.lengths)
        if length > max_length:
            self.too_long.append(length)
            self.left_out[TOO_LONG] += 1
        else:
            self.pairs.append(pair)

    def dataset(self) -> Dataset:
        return Dataset.from_dict(
            {
                "prompt_ids": [pair.prompt_ids for pair in self.pairs],
                "chosen_ids": [pair.chosen_ids for pair in self.pairs],
                "rejected_ids": [pair.rejected_ids for pair in self.pairs],
                "tokens": [sum(pair.lengths) for pair in self.pairs],
            }
        )

    def counts(self) -> dict:
        return {
            "documents": len(self.pairs),
            "rows": len(self.pairs),
            "text_tokens": sum(sum(pair.lengths) for pair in self.pairs),
            "bytes": sum(pair.answer_bytes for pair in self.pairs),
            "left_out": dict(self.left_out),
        }


def prepare_pairs(
    train: list[Source],
    evaluation: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    eval_fraction: float = 0.0,
) -> tuple[dict[str, Dataset], dict]:
    """Read and tokenize preferences for `DPOTrainer`.

    Pairs of which an answer does not fit into `max_length` with its prompt are left out and counted, as are those whose
    answers are the same.

    Args:
        train, evaluation: the sources of each split.
        tokenizer: with its chat template.
        max_length: tokens of a prompt with an answer at most.
        eval_fraction: share of the training pairs to hold out, by prompt.

    Returns:
        {"train": Dataset, "validation": Dataset} with the columns `prompt_ids`, `chosen_ids`, `rejected_ids` and
        `tokens` (of the prompt with each answer, added up), and the manifest.

    Raises:
        UserError: there are no pairs, or a row lacks prompt, chosen or rejected.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()  # those of TRL
    template = ChatTemplate(tokenizer)
    splits = {"train": _PairSplit(), "validation": _PairSplit()}
    repaired: Counter = Counter()
    for sources_split, sources in (("train", train), ("validation", evaluation)):
        for source in sources:
            for pair in _read_pairs(source, template, repaired):
                if isinstance(pair, LeftOut):
                    splits[sources_split].left_out[pair.reason] += 1
                    continue
                # By prompt, so that all answers to a prompt end in the same split.
                is_held_out = pair.prompt_hash < eval_fraction
                splits["validation" if is_held_out else sources_split].add(pair, max_length)
    check_held_out(eval_fraction, len(splits["train"].pairs), len(splits["validation"].pairs), "pairs")
    for name, key in (("train", "train_data"), ("validation", "eval_data")):
        if not splits[name].pairs:
            raise UserError(_describe_empty_split(key, splits[name], max_length))
    plan = {
        "objective": "dpo",
        "max_length": max_length,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": tokenizer.chat_template,
        "train": [identity(source) for source in train],
        "evaluation": [identity(source) for source in evaluation],
        "eval_fraction": eval_fraction,
    }
    manifest = plan | {
        "fingerprint": fingerprint(plan),
        "splits": {name: split.counts() for name, split in splits.items()},
        "skipped_files": skipped_files([*train, *evaluation]),
        "repaired": dict(repaired),
    }
    return {name: split.dataset() for name, split in splits.items()}, manifest


def _describe_empty_split(key: str, split: _PairSplit, max_length: int) -> str:
    if split.too_long and split.left_out.keys() == {TOO_LONG}:
        return (
            f"{key} has no pair of answers that fits into max_length {max_length}; raise it: "
            f"{describe_lengths(split.too_long)}"
        )
    if split.left_out:
        return f"{key} has no pair of answers that can be learned from ({join_reasons(split.left_out)}); add others"
    return f"{key} has no pair of answers; set it"


# --- From rows to messages --------------------------------------------------------------------------------------------


def read_pair(row: dict, row_name: str, repeats_prompt: bool = False) -> Pair:
    """The prompt and the two answers of a row, as messages. A column or key that is null counts as absent.

    The prompt is `prompt`, as text or messages, or ShareGPT's `conversations`. The answers, `chosen` and `rejected`,
    are texts, messages, or whole conversations that start with the prompt. Without a prompt, it is what both start
    with.

    Args:
        row: of a data set.
        row_name: the row, for messages.
        repeats_prompt: whether answers that are texts start with the prompt.

    Raises:
        UserError: the row lacks prompt, chosen or rejected.
    """
    row = {key: value for key, value in row.items() if value is not None}
    prompt = row.get("prompt")
    has_whole_conversations = isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1
    if prompt is None and not has_whole_conversations:
        prompt = row.get("conversations", row.get("messages"))
    if prompt is None and row.get("chosen") and row.get("rejected"):
        row = _extract_prompt(row, row_name)
        prompt = row["prompt"] or None
    for key, value in (("prompt", prompt), ("chosen", row.get("chosen")), ("rejected", row.get("rejected"))):
        is_empty_prompt = key == "prompt" and value == ""
        if not value and not is_empty_prompt:
            raise UserError(f"{row_name} has no {key}; preferences need prompt, chosen and rejected")
    answers = [row["chosen"], row["rejected"]]
    if repeats_prompt:
        answers = [answer[len(prompt) :] for answer in answers]
    prompt_messages = _read_messages(prompt, "user", row_name)
    chosen, rejected = (_read_messages(answer, "assistant", row_name) for answer in answers)
    shared = _count_shared_messages(chosen, rejected)
    if shared and _repeats_prompt(prompt_messages, chosen[:shared]):
        return Pair(chosen[:shared], chosen[shared:], rejected[shared:], row)
    ends_with_question = bool(prompt_messages) and prompt_messages[-1]["role"] == "user"
    if ends_with_question and "user" in (chosen[0]["role"], rejected[0]["role"]):
        raise UserError(f"{row_name} has a prompt that is not in the conversations of its answers; correct it")
    return Pair(prompt_messages, chosen, rejected, row)


def _extract_prompt(row: dict, row_name: str) -> dict:
    """A row with the prompt that both answers start with, and the answers without it."""
    from trl import extract_prompt  # takes seconds to import

    answers = {key: row[key] for key in ("chosen", "rejected")}
    if not isinstance(row["chosen"], str):
        answers = {key: _read_messages(answer, "assistant", row_name) for key, answer in answers.items()}
    return row | extract_prompt(answers)


def _count_shared_messages(chosen: list[dict], rejected: list[dict]) -> int:
    """The number of messages with which both conversations start, if they start with a prompt."""
    if chosen[0]["role"] == "assistant":
        return 0
    longest = min(len(chosen), len(rejected)) - 1  # an answer has to remain of each
    for number in range(longest):
        if _role_and_text(chosen[number]) != _role_and_text(rejected[number]):
            return number
    return longest


def _repeats_prompt(prompt: list[dict], beginning: list[dict]) -> bool:
    """Whether the messages of a prompt occur one after the other in the beginning of a conversation.

    A prompt that is a text is the first or the last question of the conversation.
    """
    prompt_texts = [_role_and_text(message) for message in prompt]
    texts = [_role_and_text(message) for message in beginning]
    starts = range(len(texts) - len(prompt_texts) + 1)
    return any(texts[start : start + len(prompt_texts)] == prompt_texts for start in starts)


def _role_and_text(message: dict) -> tuple[str, str]:
    return message["role"], message.get("content", "").strip()


def _read_messages(value: Any, role: str, row_name: str) -> list[dict]:
    try:
        return read_messages(value, role)
    except ConversationError as error:
        raise UserError(f"{row_name} {error}") from error


# --- From messages to tokens ------------------------------------------------------------------------------------------


def _read_pairs(source: Source, template: ChatTemplate, repaired: Counter) -> Iterator[TokenizedPair | LeftOut]:
    repeats_prompt = _all_repeat_prompt(source)
    for row_name, row in read_rows(source, repaired=repaired):
        pair = read_pair(row, row_name, repeats_prompt)
        if pair.chosen == pair.rejected:
            yield LeftOut(EQUAL_ANSWERS)
            continue
        try:
            conversations = [
                make_conversation(pair.prompt, answer, pair.row, template) for answer in (pair.chosen, pair.rejected)
            ]
        except ConversationError as error:
            raise UserError(f"{row_name} {error}") from error
        reasons = [reason_to_leave_out(conversation) for conversation in conversations]
        reason = reasons[0] or reasons[1]
        yield LeftOut(reason) if reason else _tokenize_pair(pair, conversations, row_name, template)


def _all_repeat_prompt(source: Source) -> bool:
    """Whether all rows are texts of which both answers start with the prompt."""
    rows = 0
    for _, row in read_rows(source):
        prompt, chosen, rejected = (row.get(key) for key in ("prompt", "chosen", "rejected"))
        if not all(isinstance(text, str) and text for text in (prompt, chosen, rejected)):
            return False
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            return False
        rows += 1
    return rows > 0


def _tokenize_pair(
    pair: Pair, conversations: list[Conversation], row_name: str, template: ChatTemplate
) -> TokenizedPair:
    """The prompt is what both conversations share, up to the first token that is learned of either."""
    with rendering_limits(template.where, len(conversations)):
        rendered = [render_conversation(conversation, row_name, template) for conversation in conversations]
    tokenized: list[TokenizedConversation] = []
    for result in tokenize_rendered(template, rendered):
        if isinstance(result, ConversationError):
            raise UserError(f"{row_name} {result}")
        tokenized.append(result)
    chosen, rejected = tokenized
    prompt_length = min(
        int(np.flatnonzero(chosen.targets)[0]),
        int(np.flatnonzero(rejected.targets)[0]),
        _common_prefix_length(chosen.ids, rejected.ids),
    )
    last_messages = (pair.chosen[-1], pair.rejected[-1])
    return TokenizedPair(
        prompt_ids=chosen.ids[:prompt_length],
        chosen_ids=chosen.ids[prompt_length:],
        rejected_ids=rejected.ids[prompt_length:],
        prompt_hash=unit_hash(json.dumps(pair.prompt).encode()),
        answer_bytes=sum(len(message.get("content", "").encode()) for message in last_messages),
    )


def _common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """The number of ids with which both arrays start."""
    shorter = min(len(first), len(second))
    differences = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differences[0]) if len(differences) else shorter
