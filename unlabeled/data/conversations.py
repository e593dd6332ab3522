"""Conversations of a source as tokens, and which of them are learned."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast

from unlabeled.data.conversation import Conversation, ConversationError, RenderedConversation, TokenizedConversation
from unlabeled.data.conversation_tokens import tokenize_rendered
from unlabeled.data.messages import PlainText, read_example
from unlabeled.data.readers import read_rows
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.sources import Source
from unlabeled.data.template_rendering import REASONING_KEYS, ChatTemplate
from unlabeled.data.tokenization import encode_batch, framing
from unlabeled.data.turn_location import locate_turns
from unlabeled.errors import UserError

BATCH = 256  # conversations that are tokenized together
GREEN = "\033[32m"
RESET = "\033[0m"

# Why an example is left out.
EMPTY_ANSWER = "an empty answer"
NO_ANSWER = "no turn of the assistant"


@dataclass(frozen=True)
class LeftOut:
    """An example that is not learned, and the reason."""

    reason: str


def read_conversations(
    source: Source, tokenizer: PreTrainedTokenizerFast, repaired: Counter | None = None
) -> Iterator[TokenizedConversation | LeftOut]:
    """The examples of a source, in the shapes that `messages.read_example` knows, tokenized.

    Messages go through the chat template. What the assistant says in them is learned, with the token that ends its
    turn; of a `completion`, only what it says there. Plain text stands between bos and eos: prompt and completion are
    tokenized separately, and the completion with its eos is learned. The name of a control token in a message is
    encoded as its characters.

    Args:
        source: of conversations.
        tokenizer: with its chat template.
        repaired: counts the rows that were changed, by reason.

    Raises:
        UserError: naming file and row, for an example that is none of these, or of which it is not clear which tokens
            are learned.
    """
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    rows = read_rows(source, repaired=repaired)
    while batch := list(islice(rows, BATCH)):
        yield from _tokenize_rows(batch, tokenizer, template)


def _tokenize_rows(
    rows: list[tuple[str, dict]], tokenizer: PreTrainedTokenizerFast, template: ChatTemplate | None
) -> list[TokenizedConversation | LeftOut]:
    results: dict[int, TokenizedConversation | LeftOut] = {}
    rendered: dict[int, RenderedConversation] = {}
    with rendering_limits(template.where, len(rows)) if template else nullcontext():
        for number, (row_name, row) in enumerate(rows):
            example = read_example(row, row_name, template)
            if isinstance(example, PlainText):
                results[number] = _tokenize_plain_text(example, tokenizer)
                continue
            reason = reason_to_leave_out(example)
            if reason:
                results[number] = LeftOut(reason)
            else:
                rendered[number] = render_conversation(example, row_name, template)
    if rendered:
        tokenized = tokenize_rendered(template, list(rendered.values()))
        for number, result in zip(rendered, tokenized, strict=True):
            if isinstance(result, ConversationError):
                raise UserError(f"{rows[number][0]} {result}")
            results[number] = result
    return [results[number] for number in range(len(rows))]


def render_conversation(
    conversation: Conversation, row_name: str, template: ChatTemplate | None
) -> RenderedConversation:
    """What the chat template writes of a conversation, and where its turns stand.

    Raises:
        UserError: there is no template, or it does not fit the conversation.
    """
    if template is None:
        raise UserError(f"{row_name} is a conversation, and the tokenizer has no chat template; set chat_template")
    try:
        return locate_turns(template, conversation)
    except ConversationError as error:
        raise UserError(f"{row_name} {error}") from error


def reason_to_leave_out(conversation: Conversation) -> str | None:
    """Why nothing can be learned from a conversation, or None."""
    learned = [conversation.messages[number] for number in conversation.learned()]
    if not learned:
        return NO_ANSWER
    for message in learned:
        texts = [message.get("content", ""), *(message.get(key) or "" for key in REASONING_KEYS)]
        if not any(text.strip() for text in texts) and not message.get("tool_calls"):
            return EMPTY_ANSWER
    return None


def _tokenize_plain_text(example: PlainText, tokenizer: PreTrainedTokenizerFast) -> TokenizedConversation | LeftOut:
    if not example.completion.strip():
        return LeftOut(EMPTY_ANSWER)
    frame = framing(tokenizer, "clm")
    prompt, completion = encode_batch(tokenizer, [example.prompt, example.completion])
    ids = np.concatenate([[frame.prefix_id], prompt, completion, [frame.suffix_id]]).astype(np.int32)
    targets = np.arange(len(ids)) > len(prompt)
    return TokenizedConversation(ids, targets, len(example.completion.encode()))


def show_targets(tokenizer: PreTrainedTokenizerFast, row: dict) -> str:
    """The first conversation of a prepared row, with what is learned in green, or in » « without a terminal."""
    start_mark, end_mark = (GREEN, RESET) if sys.stdout.isatty() else ("»", "«")
    length = row["lengths"][0]
    ids = np.asarray(row["input_ids"][:length])
    targets = np.asarray(row["targets"][:length], dtype=bool)
    changes = np.flatnonzero(targets[1:] != targets[:-1]) + 1
    shown = ""
    for start, end in pairwise([0, *changes, length]):
        text = tokenizer.decode(ids[start:end])
        shown += start_mark + text + end_mark if targets[start] else text
    return shown
