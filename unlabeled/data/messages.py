"""Conversations in the shapes in which data sets hold them, as messages with role and content."""

import json
from dataclasses import dataclass
from typing import Any

from unlabeled.data.conversation import Conversation, ConversationError
from unlabeled.data.template_rendering import SPOKEN_KEYS, ChatTemplate
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


@dataclass(frozen=True)
class PlainText:
    """A prompt and its completion that are not a conversation."""

    prompt: str
    completion: str


def read_example(row: dict, row_name: str, template: ChatTemplate | None) -> Conversation | PlainText:
    """The conversation or plain text in a row, whatever its shape. A column or key that is null counts as absent.

    - `messages`: role and content, which may be a list of parts of type text.
    - `conversations`: ShareGPT's from and value, or role and content.
    - `prompt` and `completion`: each as text or as messages. Two texts are a `PlainText`.
    - Alpaca's `instruction`, `input` and `output`: the user says instruction and input, separated by an empty line.

    Besides these, `system` (text), `tools` (a list or its JSON text) and `chat_template_kwargs` are read.

    Args:
        row: of a data set.
        row_name: the row, for messages.
        template: if given, roles and keys that it does not know are refused.

    Raises:
        UserError: the row is no conversation.
    """
    if not isinstance(row, dict):
        raise UserError(f"{row_name} is no conversation; {SHAPES}")
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if "messages" not in row and "conversations" not in row:
            prompt, completion = row.get("prompt"), row.get("completion")
            if isinstance(prompt, str) and isinstance(completion, str):
                return PlainText(prompt, completion)
        return _conversation(row, template)
    except ConversationError as error:
        raise UserError(f"{row_name} {error}") from error


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
    """Combine prompt and answer with the other columns of a row, and check them.

    Args:
        prompt: messages that are not learned.
        answer: messages of which the assistant's are learned.
        row: for system, tools and variables of the template.
        template: if given, roles and keys that it does not know are refused.

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
    tools = _without_null(_parse_json_list(row["tools"], "tools")) if "tools" in row else None
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


def read_messages(value: Any, role: str | None = None) -> list[dict]:
    """Messages with role and content from a column of a data set.

    Args:
        value: a list of messages, one message, or a text.
        role: of a text; None refuses texts.

    Raises:
        ConversationError: the value is none of these.
    """
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, dict):  # one message
        value = [value]
    if not isinstance(value, list) or not value:
        raise ConversationError(f"is no conversation; {SHAPES}")
    return [_read_message(message) for message in value]


def _read_message(value: Any) -> dict:
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


def _read_content(content: Any) -> str:
    """The text of a content; parts are joined."""
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
    name = message["from"]
    value = message.get("value")
    if name not in SHAREGPT_ROLES:
        raise ConversationError(f"has a message from {name!r}, which is none of {', '.join(SHAREGPT_ROLES)}; rename it")
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    role = SHAREGPT_ROLES[name]
    if name == "function_call":
        calls = _read_calls(value)
        return {"role": role, "tool_calls": calls, **rest}
    return {"role": role, "content": _read_content("" if value is None and role == "assistant" else value), **rest}


def _read_calls(value: Any) -> list[dict]:
    """Function calls from the JSON text of one or several, each with name and arguments."""
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


def _without_null(value: Any) -> Any:
    """Remove keys that are null: data sets fill in null for keys that other rows have."""
    if isinstance(value, dict):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_null(part) for part in value]
    return value


def _parse_json_list(value: Any, name: str) -> list | None:
    """A list, or the JSON text of one; None for an empty one.

    Raises:
        ConversationError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise ConversationError(f"has {name} that are not JSON ({error}); correct them") from error
    if not isinstance(value, list):
        raise ConversationError(f"has {name} of type {type(value).__name__}; give it a list, or the JSON text of one")
    return value or None
