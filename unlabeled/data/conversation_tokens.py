"""Rendered conversations as token ids, and which of the tokens are learned."""

import re

import numpy as np

from unlabeled.data.conversation import Conversation, ConversationError, RenderedConversation, TokenizedConversation
from unlabeled.data.encoding import EncodedText, bare_backend, encode_texts
from unlabeled.data.message_markers import MessageMarkers, strings_in
from unlabeled.data.template_rendering import ChatTemplate
from unlabeled.errors import UserError

Turns = list[tuple[int, int]]
EXCERPT = 40  # characters of a text in a message


def tokenize_rendered(
    template: ChatTemplate, conversations: list[RenderedConversation]
) -> list[TokenizedConversation | ConversationError]:
    """Tokenize rendered conversations with the tokenizer's threads.

    Where no message contains the name of a control token, the ids are those of `apply_chat_template(tokenize=True)`.
    Otherwise that name is encoded as its characters.

    Returns:
        For each conversation its tokens, or an error if tokens and turns cannot be aligned.
    """
    results: dict[int, TokenizedConversation | ConversationError] = {}
    plain = [number for number, conversation in enumerate(conversations) if not conversation.quoted]
    quoting = [number for number, conversation in enumerate(conversations) if conversation.quoted]
    plain_texts = [(conversations[number].text, conversations[number].turns) for number in plain]
    quoting_texts = [_rename_control_tokens(template, conversations[number]) for number in quoting]
    for numbers, texts in ((plain, plain_texts), (quoting, quoting_texts)):
        if not numbers:
            continue
        backend = template.renamed.backend if numbers is quoting else template.tokenizer.backend_tokenizer
        with bare_backend(backend):
            encoded_texts = encode_texts(backend, [text for text, _ in texts], offsets=True)
        for number, encoded, (text, turns) in zip(numbers, encoded_texts, texts, strict=True):
            results[number] = _find_targets(template, conversations[number], encoded, text, turns)
    return [results[number] for number in range(len(conversations))]


def _rename_control_tokens(template: ChatTemplate, conversation: RenderedConversation) -> tuple[str, Turns]:
    """The text and its turns with other names for the control tokens that the template itself writes.

    What remains of the original names was written by somebody, and is encoded as characters.
    """
    pieces: list[str] = []
    old_ends = [0]  # characters up to which the new text is known, in the old text and in the new one
    new_ends = [0]
    for match in template.control_pattern.finditer(conversation.text):
        if any(start <= match.start() < end for start, end in conversation.quoted):
            continue
        piece = conversation.text[old_ends[-1] : match.start()] + template.renamed.names[match[0]]
        pieces.append(piece)
        old_ends.append(match.end())
        new_ends.append(new_ends[-1] + len(piece))
    pieces.append(conversation.text[old_ends[-1] :])

    def moved(position: int) -> int:
        index = int(np.searchsorted(old_ends, position, side="right")) - 1
        return new_ends[index] + position - old_ends[index]

    return "".join(pieces), [(moved(start), moved(end)) for start, end in conversation.turns]


def _find_targets(
    template: ChatTemplate, conversation: RenderedConversation, encoded: EncodedText, text: str, turns: Turns
) -> TokenizedConversation | ConversationError:
    """The ids of a conversation and the tokens of its turns.

    Args:
        template: the chat template.
        conversation: as the template writes it.
        encoded: the tokens of `text`.
        text: what was encoded.
        turns: the turns in `text`.
    """
    ids = template.renamed.original_ids(encoded.ids) if conversation.quoted else encoded.ids
    starts = encoded.offsets[:, 0]
    ends = encoded.offsets[:, 1]
    targets = np.zeros(len(ids), dtype=bool)
    decodes_exactly = _decode(template, ids) == conversation.text
    target_bytes = 0
    for (start, end), (original_start, original_end) in zip(turns, conversation.turns, strict=True):
        is_inside = (starts < end) & (ends > start)
        is_inside |= (starts == ends) & (starts >= start) & (starts < end)
        problem = _find_misalignment(text, starts[is_inside], ends[is_inside], start, end)
        expected = conversation.text[original_start:original_end]
        if not problem and decodes_exactly and _decode(template, ids[is_inside]).lstrip() != expected.lstrip():
            problem = f"the tokens of {expected[:EXCERPT]!r} give another text"
        if problem:
            return ConversationError(f"cannot be aligned: {problem}; correct it or leave it out")
        targets |= is_inside
        target_bytes += len(expected.encode("utf-8", errors="replace"))
    return TokenizedConversation(ids, targets, target_bytes)


def _find_misalignment(text: str, starts: np.ndarray, ends: np.ndarray, start: int, end: int) -> str | None:
    """What is wrong with tokens that have to cover the characters from `start` to `end`, or None.

    Args:
        text: the text.
        starts, ends: the characters of each token.
        start, end: the characters of the turn.
    """
    turn = text[start:end]
    if not len(starts):
        return f"no token belongs to {turn[:EXCERPT]!r}"
    first = int(starts.min())
    last = int(ends.max())
    if text[min(first, start) : start].strip():
        return f"a token holds the beginning of {turn[:EXCERPT]!r} and what stands before it"
    if text[end : max(last, end)].strip():
        return f"a token holds the end of {turn[-EXCERPT:]!r} and what stands after it"
    changes = np.zeros(end - start + 1, dtype=np.int64)  # in the number of tokens that cover a character
    np.add.at(changes, np.clip(starts - start, 0, end - start), 1)
    np.add.at(changes, np.clip(ends - start, 0, end - start), -1)
    uncovered = np.flatnonzero(np.cumsum(changes)[:-1] == 0)
    if any(not turn[position].isspace() for position in uncovered):
        return f"a part of {turn[:EXCERPT]!r} has no token"
    return None


def _decode(template: ChatTemplate, ids: np.ndarray) -> str:
    return template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_prompt(template: ChatTemplate, messages: list[dict]) -> list[int]:
    """The ids of messages and of the generation prompt. The names of control tokens in messages are characters.

    Raises:
        UserError: the template refuses the messages.
    """
    try:
        text = template.render(messages, add_generation_prompt=True)
    except ConversationError as error:
        raise UserError(f"the conversation {error}") from error
    if not _contains(messages, template.control_pattern):
        return template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    markers = MessageMarkers(template, Conversation(messages), text)
    marked_messages = [markers.mark_quotes(message, message["role"] == "assistant") for message in messages]
    marked = markers.read(template.render(marked_messages, add_generation_prompt=True))
    if marked is None:
        raise UserError("the chat template looks at a control token in a message; leave it out of the message")
    [tokenized] = tokenize_rendered(template, [RenderedConversation(text, [], marked.quoted)])
    if isinstance(tokenized, ConversationError):
        raise UserError(f"the conversation {tokenized}")
    return tokenized.ids.tolist()


def _contains(messages: list[dict], pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(text) for text in strings_in(messages))
