"""Markers in a conversation that tell where a chat template writes each message.

A conversation is rendered a second time with marker characters at the edges of each message. Where the rendered text
without the markers is the same, the markers tell where each message stands.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unlabeled.data.conversation import Conversation
from unlabeled.data.template_rendering import REASONING_KEYS, ChatTemplate

MARKERS = range(0xF0000, 0xFFFFE)  # a private-use plane of Unicode
MARKER = re.compile(f"[{chr(MARKERS[0])}-{chr(MARKERS[-1])}]")
THINK = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
# The part of a message that each kind of marker shows to be written.
PART_OF_MARKER = {
    "start": None, "end": "content", "thought": "reasoning", "answer": None, "reasoning": "reasoning", "call": "call",
}  # fmt: skip


@dataclass
class MarkedText:
    """What the markers tell of a rendered text.

    Attributes:
        text: without the markers.
        is_written: {(message, part): whether the template writes it}, for the parts content, reasoning and call.
        content_start: {message: character at which its content starts}.
        quoted: the characters (start, end) of the names of control tokens in messages.
        edges: {message: the characters at which something of it starts or ends, in order}.
    """

    text: str
    is_written: dict[tuple[int, str], bool]
    content_start: dict[int, int]
    quoted: list[tuple[int, int]]
    edges: dict[int, list[int]]

    def positions(self, number: int) -> list[int]:
        """The characters at which something of a message starts or ends, in order."""
        return self.edges.get(number, [])


class MessageMarkers:
    """Puts markers into a conversation and finds them in what is rendered of it.

    Args:
        template: the chat template.
        conversation: what is rendered.
        text: the conversation rendered without markers.
    """

    def __init__(self, template: ChatTemplate, conversation: Conversation, text: str):
        self.template = template
        self.text = text
        used = set(text)
        for value in (conversation.messages, conversation.tools):
            for string in strings_in(value):
                used.update(string)
        self._unused = (chr(code) for code in MARKERS if chr(code) not in used)
        self._owner: dict[str, tuple[int, str]] = {}  # marker: (message, kind of marker)
        self._prefixes: dict[str, str] = {}  # marker: what stands before it in the content of its message
        self._quotes: list[tuple[str, str, str]] = []  # (marker, name of a control token, marker)

    def _marker(self, number: int, kind: str) -> str:
        marker = next(self._unused)
        self._owner[marker] = (number, kind)
        return marker

    # --- Marking ------------------------------------------------------------------------------------------------------

    def mark_message(self, number: int, message: dict, depth: int, mark_others: bool) -> dict:
        """A message with markers.

        Args:
            number: of the message.
            message: the message.
            depth: characters of its leading white space that stand before the first marker.
            mark_others: mark messages of other roles than the assistant too.
        """
        is_assistant = message["role"] == "assistant"
        marked = self.mark_quotes(message, is_assistant)
        if not is_assistant and not mark_others:
            return marked
        content = message.get("content", "")
        if content.strip():
            marked["content"] = self._mark_content(number, content, depth, is_assistant)
        if not is_assistant:
            return marked
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str) and message[key].strip():
                leading, core, trailing = split_white_space(message[key])
                core = self._marker(number, "reasoning") + self.mark_quotes(core, is_assistant)
                marked[key] = leading + core + trailing
        if isinstance(message.get("tool_calls"), list):
            marked["tool_calls"] = [self._mark_call(number, call) for call in marked["tool_calls"]]
        return marked

    def _mark_content(self, number: int, content: str, depth: int, is_assistant: bool) -> str:
        leading, core, trailing = split_white_space(content)
        start = leading[:depth] + self._marker(number, "start") + leading[depth:]
        end = self._marker(number, "end") + trailing
        thought = THINK.fullmatch(core) if is_assistant else None
        if not thought or not thought[4]:
            return start + self.mark_quotes(core, is_assistant) + end
        opening, reasoning, closing, answer = thought.groups()
        middle = opening
        if reasoning:
            marker = self._marker(number, "thought")
            self._prefixes[marker] = opening
            middle += marker
        marker = self._marker(number, "answer")
        self._prefixes[marker] = opening + reasoning + closing
        middle += self.mark_quotes(reasoning, is_assistant) + closing + marker + self.mark_quotes(answer, is_assistant)
        return start + middle + end

    def _mark_call(self, number: int, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        function = call.get("function")
        if not isinstance(function, dict):
            function = call
        if not isinstance(function.get("name"), str):
            return call
        marked = function | {"name": self._marker(number, "call") + function["name"]}
        return marked if function is call else call | {"function": marked}

    def mark_quotes(self, value: Any, is_assistant: bool) -> Any:
        """A text, or all texts in a structure, with markers around the names of control tokens."""
        if isinstance(value, str):
            pattern = self.template.end_pattern if is_assistant else self.template.control_pattern
            return pattern.sub(self._quote, value)
        if isinstance(value, dict):
            return {key: part if key == "role" else self.mark_quotes(part, is_assistant) for key, part in value.items()}
        if isinstance(value, list):
            return [self.mark_quotes(part, is_assistant) for part in value]
        return value

    def _quote(self, match: re.Match[str]) -> str:
        start = next(self._unused)
        end = next(self._unused)
        self._quotes.append((start, match[0], end))
        return start + match[0] + end

    # --- Reading ------------------------------------------------------------------------------------------------------

    def read(self, rendered: str) -> MarkedText | None:
        """What the markers in a rendered text tell; None if they have changed the text."""
        text, positions = self._remove_markers(rendered)
        if text != self.text:
            return None
        edges: dict[int, list[int]] = {}
        is_written: dict[tuple[int, str], bool] = {}
        for marker, (number, kind) in self._owner.items():
            marker_positions = positions.get(marker, [])
            edges.setdefault(number, []).extend(marker_positions)
            part = PART_OF_MARKER[kind]
            if part == "call":  # all calls have to be written
                is_written[number, part] = bool(marker_positions) and is_written.get((number, part), True)
            elif part:
                is_written[number, part] = bool(marker_positions) or is_written.get((number, part), False)
        content_start = self._find_content_starts(positions)
        for number, start in content_start.items():
            edges[number].append(start)
        quoted = [
            (start, start + len(name))
            for start_marker, name, end_marker in self._quotes
            for start in positions.get(start_marker, [])
            if start + len(name) in positions.get(end_marker, [])
        ]
        sorted_edges = {number: sorted(characters) for number, characters in edges.items()}
        return MarkedText(text, is_written, content_start, sorted(quoted), sorted_edges)

    def _remove_markers(self, rendered: str) -> tuple[str, dict[str, list[int]]]:
        """The text without markers, and {marker: the characters of that text at which it stands}."""
        known = {*self._owner}
        for start_marker, _, end_marker in self._quotes:
            known |= {start_marker, end_marker}
        pieces: list[str] = []
        positions: dict[str, list[int]] = {}
        end = 0
        length = 0
        for match in MARKER.finditer(rendered):
            if match[0] not in known:
                continue
            pieces.append(rendered[end : match.start()])
            length += match.start() - end
            end = match.end()
            positions.setdefault(match[0], []).append(length)
        pieces.append(rendered[end:])
        return "".join(pieces), positions

    def _find_content_starts(self, positions: dict[str, list[int]]) -> dict[int, int]:
        """{message: character at which its content starts}, its reasoning included where the template writes it."""
        content_start: dict[int, int] = {}
        for marker, (number, kind) in self._owner.items():
            marker_positions = positions.get(marker)
            if not marker_positions or kind not in ("start", "thought", "answer"):
                continue
            prefix = self._prefixes.get(marker, "")
            first = marker_positions[0]
            if self.text[:first].endswith(prefix):
                content_start[number] = min(content_start.get(number, len(self.text)), first - len(prefix))
            elif kind == "answer":
                content_start.setdefault(number, first)
        return content_start


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a structure of dictionaries and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)


def split_white_space(text: str) -> tuple[str, str, str]:
    """(leading white space, text, trailing white space)."""
    core = text.strip()
    leading = text[: indentation(text)]
    return leading, core, text[len(leading) + len(core) :]


def indentation(text: str) -> int:
    """Characters of leading white space."""
    return len(text) - len(text.lstrip())
