"""Conversations: the shapes in which data sets hold them, as messages, and as ids with what is learned of them."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from unlabeled.data.chat_templates import (
    REASONING_KEYS,
    SPOKEN_KEYS,
    ChatTemplate,
    Conversation,
    ConversationError,
    Rendered,
    Tokenized,
    parse_json_list,
)
from unlabeled.data.readers import read_rows
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.sources import Source
from unlabeled.data.tokenization import encode_batch, framing
from unlabeled.errors import UserError

# The names that ShareGPT's `from` has for roles.
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
SHAPES = (
    "give it `messages` (each with role and content), `prompt` and `completion`, `conversations` (each with from and "
    "value), or `instruction` and `output`"
)
# Arguments of `apply_chat_template` that no row may set.
RESERVED_OPTIONS = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
BATCH = 256  # conversations that are tokenised together

EMPTY_ANSWER = "an empty answer"
NO_ANSWER = "no turn of the assistant"


@dataclass(frozen=True)
class LeftOut:
    """An example that is not learned, and why."""

    reason: str


@dataclass(frozen=True)
class PlainText:
    """A prompt and its completion that stand in no conversation."""

    prompt: str
    completion: str


# --- From rows to messages -------------------------------------------------------------------------------------------


def read_example(row: dict, place: str, template: ChatTemplate | None) -> Conversation | PlainText:
    """What a row holds, whatever its shape. A column or key that is null counts as absent.

    - `messages`: role and content, which may be a list of parts of type text.
    - `conversations`: ShareGPT's from and value, or role and content.
    - `prompt` and `completion`: each as text or as messages; two texts are a `PlainText`.
    - `instruction`, `input` and `output`, Alpaca's: the user says instruction and input, an empty line between them.

    Beside these `system` (text), `tools` (a list or its JSON text) and `chat_template_kwargs` are read.

    Args:
        template: checks roles and keys; None does not.

    Raises:
        UserError: beginning with `place`.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place} is no conversation; {SHAPES}")
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if "messages" not in row and "conversations" not in row:
            prompt, completion = row.get("prompt"), row.get("completion")
            if isinstance(prompt, str) and isinstance(completion, str):
                return PlainText(prompt, completion)
        return _conversation(row, template)
    except ConversationError as error:
        raise UserError(f"{place} {error}") from error


def _conversation(row: dict, template: ChatTemplate | None) -> Conversation:
    prompt: list = []
    if "messages" in row or "conversations" in row:
        answer = read_messages(row["messages"] if "messages" in row else row["conversations"])
    elif "prompt" in row and "completion" in row:
        prompt = [] if row["prompt"] == [] else read_messages(row["prompt"], "user")
        answer = read_messages(row["completion"], "assistant")
    elif "instruction" in row and "output" in row:
        prompt = _alpaca_prompt(row)
        answer = read_messages(row["output"], "assistant")
    else:
        raise ConversationError(f"is no conversation; {SHAPES}")
    return make_conversation(prompt, answer, row, template)


def make_conversation(prompt: list, answer: list, row: dict, template: ChatTemplate | None) -> Conversation:
    """Prompt and answer, with what else a row says of a conversation, checked.

    Raises:
        ConversationError: the template does not know a role, or would not write what is said.
    """
    messages = prompt + answer
    if not messages:
        raise ConversationError(f"is no conversation; {SHAPES}")
    first_learned = len(prompt)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        first_learned += 1
    tools = _without_null(parse_json_list(row["tools"], "tools")) if "tools" in row else None
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ConversationError("has chat_template_kwargs that are no mapping; correct them")
    for name in RESERVED_OPTIONS:
        if name in options:
            raise ConversationError(f"has chat_template_kwargs with {name}, which is no variable; remove it")
    unlearned = {number for number, message in enumerate(messages) if _weight(message) == 0}
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if template:
        _check_messages(messages, template)
        if tools and not template.reads_tools:
            raise ConversationError("has tools, which the chat template does not write; set another, or remove them")
    options = {key: value for key, value in options.items() if value is not None}
    return Conversation(messages, first_learned, frozenset(unlearned), tools, options)


def _weight(message: dict) -> int:
    """OpenAI's weight of a message: 0 for one that is not learned."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise ConversationError(f"has a message with weight {weight!r}; weights are 0 (not learned) and 1")
    return int(weight)


def _check_messages(messages: list[dict], template: ChatTemplate) -> None:
    for message in messages:
        if not template.knows_role(message["role"]):
            raise ConversationError(
                f"has the role {message['role']!r}, which the chat template does not know; rename it to system, user, "
                "assistant or tool"
            )
        for key in SPOKEN_KEYS:
            if message.get(key) and not template.reads_key(key):
                raise ConversationError(
                    f"has a message with {key}, which the chat template does not write; set another, or remove it"
                )


def read_messages(value, role: str | None = None) -> list[dict]:
    """Messages with role and content from what a data set calls so; a text becomes one of the given role.

    Raises:
        ConversationError: it is neither.
    """
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, dict):  # one message
        value = [value]
    if not isinstance(value, list) or not value:
        raise ConversationError(f"is no conversation; {SHAPES}")
    return [_read_message(message) for message in value]


def _read_message(value) -> dict:
    if not isinstance(value, dict):
        raise ConversationError(f"is no conversation; {SHAPES}")
    message = {key: part for key, part in value.items() if part is not None}
    if "from" in message and "role" not in message:
        return _sharegpt_message(message)
    if not isinstance(message.get("role"), str):
        raise ConversationError(f"is no conversation; {SHAPES}")
    for key in ("tool_calls", "function_call"):
        if key in message:
            message[key] = _without_null(message[key])
            if not message[key]:
                del message[key]
    if "content" in message:
        message["content"] = _read_content(message["content"])
    elif message["role"] == "assistant":
        if "tool_calls" not in message:
            message["content"] = ""
    else:
        raise ConversationError(f"is no conversation: a message of the role {message['role']!r} has no content")
    return message


def _read_content(content) -> str:
    """The text of a content, whose parts are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConversationError(f"is no conversation: a content is {type(content).__name__}, not text")
    texts = []
    for part in content:
        if isinstance(part, dict):
            kind = part.get("type", "text")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ConversationError(f"has a content of type {kind!r}, and only text can be learned; leave it out")
            part = part["text"]
        if not isinstance(part, str):
            raise ConversationError(f"is no conversation: a part of a content is {type(part).__name__}, not text")
        texts.append(part)
    return "".join(texts)


def _sharegpt_message(message: dict) -> dict:
    name, value = message["from"], message.get("value")
    if name not in SHAREGPT_ROLES:
        raise ConversationError(f"has a message from {name!r}, which is none of {', '.join(SHAREGPT_ROLES)}; rename it")
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    role = SHAREGPT_ROLES[name]
    if name == "function_call":
        calls = _read_calls(value)
        return {"role": role, "tool_calls": calls, **rest}
    return {"role": role, "content": _read_content("" if value is None and role == "assistant" else value), **rest}


def _read_calls(value) -> list[dict]:
    """Calls of functions from the JSON text of one or several, each with name and arguments."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError) as error:
        raise ConversationError("has a message from 'function_call' that is not JSON; correct it") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ConversationError("has a message from 'function_call' without the name of a function; correct it")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _alpaca_prompt(row: dict) -> list[dict]:
    messages = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ConversationError("has a history that is no list of pairs; correct it")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    parts = [row["instruction"], row.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise ConversationError("has an instruction or an input that is not text; correct it")
    messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())})
    return [_read_message(message) for message in messages]


def _without_null(value):
    """Without keys that are null: data sets fill what a row lacks, and other rows have, with null."""
    if isinstance(value, dict):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_null(part) for part in value]
    return value


# --- From messages to tokens -----------------------------------------------------------------------------------------


def read_conversations(source: Source, tokenizer, repaired: Counter | None = None) -> Iterator[Tokenized | LeftOut]:
    """The examples of a source, as `read_example` knows them, tokenised.

    Messages go through the chat template. What the assistant says in them is learned, with the token that ends its
    turn; of a `completion`, only what it says there. Plain text stands between bos and eos, prompt and completion are
    tokenised apart, and the completion with its eos is learned. The name of a control token that somebody wrote is
    encoded as its characters.

    Args:
        repaired: as of `read_rows`.

    Raises:
        UserError: naming file and row, for an example that is none of these, or of which it cannot be said which
            tokens are to be learned.
    """
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    rows = read_rows(source, repaired=repaired)
    while batch := list(islice(rows, BATCH)):
        yield from _tokenize_rows(batch, tokenizer, template)


def _tokenize_rows(rows: list[tuple[str, dict]], tokenizer, template: ChatTemplate | None):
    results: list[Tokenized | LeftOut | None] = [None] * len(rows)
    rendered: dict[int, Rendered] = {}
    plain: dict[int, PlainText] = {}
    with rendering_limits(template.where, len(rows)) if template else nullcontext():
        for number, (place, row) in enumerate(rows):
            example = read_example(row, place, template)
            if isinstance(example, PlainText):
                plain[number] = example
                continue
            reason = why_left_out(example)
            if reason:
                results[number] = LeftOut(reason)
                continue
            rendered[number] = render(example, place, template)
    for number, example in plain.items():
        results[number] = _tokenize_text(example, tokenizer)
    if rendered:
        tokenized = template.tokenize(list(rendered.values()))
        for number, result in zip(rendered, tokenized, strict=True):
            if isinstance(result, ConversationError):
                raise UserError(f"{rows[number][0]} {result}")
            results[number] = result
    return results


def render(example: Conversation, place: str, template: ChatTemplate | None) -> Rendered:
    """What the chat template writes of an example.

    Raises:
        UserError: beginning with `place`.
    """
    if template is None:
        raise UserError(f"{place} is a conversation, and the tokenizer has no chat template; set chat_template")
    try:
        return template.locate(example)
    except ConversationError as error:
        raise UserError(f"{place} {error}") from error


def why_left_out(example: Conversation) -> str | None:
    """Why nothing can be learned from an example; None for one that is fine."""
    learned = [example.messages[number] for number in example.learned()]
    if not learned:
        return NO_ANSWER
    for message in learned:
        said = [message.get("content", ""), *(message.get(key) or "" for key in REASONING_KEYS)]
        if not any(text.strip() for text in said) and not message.get("tool_calls"):
            return EMPTY_ANSWER
    return None


def _tokenize_text(example: PlainText, tokenizer) -> Tokenized | LeftOut:
    if not example.completion.strip():
        return LeftOut(EMPTY_ANSWER)
    frame = framing(tokenizer, "clm")
    asked, learned = encode_batch(tokenizer, [example.prompt, example.completion])
    ids = np.concatenate([[frame.prefix_id], asked, learned, [frame.suffix_id]]).astype(np.int32)
    return Tokenized(ids, np.arange(len(ids)) > len(asked), len(example.completion.encode()))


# --- What a person sees ----------------------------------------------------------------------------------------------


def show_targets(tokenizer, row: dict) -> str:
    """The first conversation of a prepared row, with what is learned in green, or between » « without a terminal."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("»", "«")
    length = row["lengths"][0]
    ids, targets = np.asarray(row["input_ids"][:length]), np.asarray(row["targets"][:length], dtype=bool)
    cuts = [0, *(np.flatnonzero(targets[1:] != targets[:-1]) + 1), len(ids)]
    parts = [tokenizer.decode(ids[start:end]) for start, end in pairwise(cuts)]
    return "".join(on + text + off if targets[start] else text for start, text in zip(cuts, parts, strict=False))
