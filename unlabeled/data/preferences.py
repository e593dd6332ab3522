"""Preferences: pairs of a better and a worse answer to a prompt, in the shapes of data sets, and as ids."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unlabeled.data.conversation import Conversation, ConversationError
from unlabeled.data.conversation_tokens import TokenizedConversation, tokenize_rendered
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

EQUAL_ANSWERS = "chosen and rejected are the same"


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, each as messages, and the row that they come from."""

    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    row: dict


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt and two answers as ids, int32 (n,) each.

    Attributes:
        prompt_hash: of the prompt's messages, in [0, 1).
        answer_bytes: of the text of both answers, in UTF-8.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    prompt_hash: float
    answer_bytes: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt with either answer."""
        return len(self.prompt_ids) + len(self.chosen_ids), len(self.prompt_ids) + len(self.rejected_ids)


def prepare_pairs(
    train: list[Source], evaluation: list[Source], tokenizer, max_length: int, eval_fraction: float = 0.0
):
    """Preferences for `DPOTrainer`: ({"train": Dataset, "validation": Dataset}, manifest).

    Columns: `prompt_ids`, `chosen_ids` and `rejected_ids`, and `tokens`, of prompt and answer, for both answers
    together. Pairs of which an answer does not fit into `max_length` with its prompt are left out and counted, as are
    those whose answers are the same.

    Raises:
        UserError: no pairs, or naming file and row, one without prompt, chosen or rejected.
    """
    from datasets import Dataset, disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # TRL will draw some
    template = ChatTemplate(tokenizer)
    pairs: dict[str, list[TokenizedPair]] = {"train": [], "validation": []}
    left_out: dict[str, Counter] = {split: Counter() for split in pairs}
    repaired: Counter = Counter()
    long: dict[str, list[int]] = {split: [] for split in pairs}
    for given, sources in (("train", train), ("validation", evaluation)):
        for source in sources:
            for pair in _read_pairs(source, template, repaired):
                if isinstance(pair, LeftOut):
                    left_out[given][pair.reason] += 1
                    continue
                # By prompt, so that all answers to one end on the same side.
                split = "validation" if pair.prompt_hash < eval_fraction else given
                if max(pair.lengths) > max_length:
                    left_out[split][TOO_LONG] += 1
                    long[split].append(max(pair.lengths))
                else:
                    pairs[split].append(pair)
    check_held_out(eval_fraction, len(pairs["train"]), len(pairs["validation"]), "pairs")
    for split, key in (("train", "train_data"), ("validation", "eval_data")):
        if not pairs[split]:
            raise UserError(_no_pairs(key, left_out[split], long[split], max_length))
    rows = {
        split: Dataset.from_dict(
            {
                "prompt_ids": [pair.prompt_ids for pair in of_split],
                "chosen_ids": [pair.chosen_ids for pair in of_split],
                "rejected_ids": [pair.rejected_ids for pair in of_split],
                "tokens": [sum(pair.lengths) for pair in of_split],
            }
        )
        for split, of_split in pairs.items()
    }
    splits = {
        split: {
            "documents": len(of_split),
            "rows": len(of_split),
            "text_tokens": sum(sum(pair.lengths) for pair in of_split),
            "bytes": sum(pair.answer_bytes for pair in of_split),
            "left_out": dict(left_out[split]),
        }
        for split, of_split in pairs.items()
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
    return rows, plan | {
        "fingerprint": fingerprint(plan),
        "splits": splits,
        "skipped_files": skipped_files([*train, *evaluation]),
        "repaired": dict(repaired),
    }


def _no_pairs(key: str, left_out: dict[str, int], long: list[int], max_length: int) -> str:
    if long and left_out.keys() == {TOO_LONG}:
        return (
            f"{key} has no pair of answers that fits into max_length {max_length}; raise it: {describe_lengths(long)}"
        )
    if left_out:
        return f"{key} has no pair of answers that can be learned from ({join_reasons(left_out)}); add others"
    return f"{key} has no pair of answers; set it"


def read_pair(row: dict, place: str, repeats_prompt: bool = False) -> Pair:
    """The prompt and the two answers of a row, as messages. A column or key that is null counts as absent.

    The prompt is `prompt`, as text or messages, or ShareGPT's `conversations`. The answers, `chosen` and `rejected`,
    are texts, messages, or whole conversations that begin with the prompt; without a prompt, what both begin with.

    Args:
        repeats_prompt: answers that are texts begin with the prompt.

    Raises:
        UserError: beginning with `place`, for a row without prompt, chosen or rejected.
    """
    from trl import extract_prompt  # which takes seconds to import

    row = {key: value for key, value in row.items() if value is not None}
    given = row.get("prompt")
    if given is None and not (isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1):
        given = row.get("conversations", row.get("messages"))
    if given is None and row.get("chosen") and row.get("rejected"):
        if not isinstance(row["chosen"], str):
            row = row | {key: _messages(row[key], "assistant", place) for key in ("chosen", "rejected")}
        row = row | extract_prompt({key: row[key] for key in ("chosen", "rejected")})  # what both begin with
        given = row["prompt"] or None
    for key, value in (("prompt", given), ("chosen", row.get("chosen")), ("rejected", row.get("rejected"))):
        if not value and not (key == "prompt" and value == ""):
            raise UserError(f"{place} has no {key}; preferences need prompt, chosen and rejected")
    answers = [row["chosen"], row["rejected"]]
    if repeats_prompt:
        answers = [answer[len(given) :] for answer in answers]
    prompt = _messages(given, "user", place)
    chosen, rejected = (_messages(answer, "assistant", place) for answer in answers)
    beginning = _shared_beginning(chosen, rejected)
    if beginning and _repeats(prompt, chosen[:beginning]):
        return Pair(chosen[:beginning], chosen[beginning:], rejected[beginning:], row)
    if prompt and prompt[-1]["role"] == "user" and "user" in (chosen[0]["role"], rejected[0]["role"]):
        raise UserError(f"{place} has a prompt that is not in the conversations of its answers; correct it")
    return Pair(prompt, chosen, rejected, row)


def _shared_beginning(chosen: list[dict], rejected: list[dict]) -> int:
    """The number of messages with which both conversations begin, where they begin with a prompt."""
    if chosen[0]["role"] == "assistant":
        return 0
    shorter = min(len(chosen), len(rejected)) - 1  # an answer is left of each
    different = (number for number in range(shorter) if _said(chosen[number]) != _said(rejected[number]))
    return next(different, shorter)


def _repeats(prompt: list[dict], beginning: list[dict]) -> bool:
    """Whether the messages of a prompt stand in the beginning of a conversation, one after the other.

    A prompt that is a text is the first or the last question of the conversation.
    """
    asked, said = [_said(message) for message in prompt], [_said(message) for message in beginning]
    return any(said[start : start + len(asked)] == asked for start in range(len(said) - len(asked) + 1))


def _said(message: dict) -> tuple[str, str]:
    return message["role"], message.get("content", "").strip()


def _messages(value, role: str, place: str) -> list[dict]:
    try:
        return read_messages(value, role)
    except ConversationError as error:
        raise UserError(f"{place} {error}") from error


def _repeat_prompts(source: Source) -> bool:
    """Whether all rows are texts, both answers of which begin with the prompt."""
    rows = 0
    for _, row in read_rows(source):
        texts = [row.get(key) for key in ("prompt", "chosen", "rejected")]
        if not all(isinstance(text, str) and text for text in texts):
            return False
        if not all(text.startswith(texts[0]) for text in texts[1:]):
            return False
        rows += 1
    return rows > 0


def _read_pairs(source: Source, template: ChatTemplate, repaired: Counter) -> Iterator[TokenizedPair | LeftOut]:
    repeats_prompt = _repeat_prompts(source)
    for place, row in read_rows(source, repaired=repaired):
        pair = read_pair(row, place, repeats_prompt)
        if pair.chosen == pair.rejected:
            yield LeftOut(EQUAL_ANSWERS)
            continue
        try:
            answers = [
                make_conversation(pair.prompt, answer, pair.row, template) for answer in (pair.chosen, pair.rejected)
            ]
        except ConversationError as error:
            raise UserError(f"{place} {error}") from error
        reason = next(filter(None, map(reason_to_leave_out, answers)), None)
        yield LeftOut(reason) if reason else _tokenize_pair(pair, answers, place, template)


def _tokenize_pair(pair: Pair, answers: list[Conversation], place: str, template: ChatTemplate) -> TokenizedPair:
    """The prompt is what the answers share, up to the first token that is learned of either."""
    with rendering_limits(template.where, len(answers)):
        rendered = [render_conversation(answer, place, template) for answer in answers]
    tokenized: list[TokenizedConversation] = []
    for result in tokenize_rendered(template, rendered):
        if isinstance(result, ConversationError):
            raise UserError(f"{place} {result}")
        tokenized.append(result)
    chosen, rejected = tokenized
    length = min(
        int(np.flatnonzero(chosen.targets)[0]),
        int(np.flatnonzero(rejected.targets)[0]),
        _common_length(chosen.ids, rejected.ids),
    )
    return TokenizedPair(
        prompt_ids=chosen.ids[:length],
        chosen_ids=chosen.ids[length:],
        rejected_ids=rejected.ids[length:],
        prompt_hash=unit_hash(json.dumps(pair.prompt).encode()),
        answer_bytes=sum(len(answer[-1].get("content", "").encode()) for answer in (pair.chosen, pair.rejected)),
    )


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    """The number of ids with which both arrays begin."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter
