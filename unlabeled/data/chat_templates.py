"""Chat templates: what they write, which characters of it the assistant says, and which tokens these are.

A template is a program that may trim, move or drop what it is given, so the assistant's turns are found in what it
writes: the conversation is rendered a second time with a marker character at the edges of each message. Where the
rendered text without the markers is the same, the markers tell where each message stands.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np

from unlabeled import compat
from unlabeled.data.control_tokens import RenamedTokenizer, control_tokens, is_markup
from unlabeled.data.encoding import EncodedText, bare_backend, encode_texts
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.tokenization import add_special_tokens
from unlabeled.errors import UserError
from unlabeled.runtime.files import read_small_file

SHIPPED = "recipes/templates/chatml.jinja"
QUESTION, ANSWER = "question", "answer"
PROBE = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
GENERATION_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
STANDARD_ROLES = ("system", "user", "assistant", "tool")
# transformers hands a template each of these names of the same thing.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys of a message that hold something to be said. Other keys are handed to the template, which may ignore them.
SPOKEN_KEYS = ("tool_calls", "function_call", *REASONING_KEYS, "refusal", "audio", "images", "videos")
THINK = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
# Templates such as Llama 3's write today's date. Data prepared on another day have to be the same, so it is this one.
TEMPLATE_DATE = datetime(2024, 7, 26)
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
MARKERS = range(0xF0000, 0xFFFFE)  # a plane of characters without a meaning
MARKER = re.compile(f"[{chr(MARKERS[0])}-{chr(MARKERS[-1])}]")


def with_fixed_date(source: str) -> str:
    """A template that writes `TEMPLATE_DATE` where it asks for today's date in a format of `datetime.strftime`."""
    return DATE_CALL.sub(lambda call: json.dumps(TEMPLATE_DATE.strftime(call[2]), ensure_ascii=False), source)


class ConversationError(ValueError):
    """What is wrong with a conversation; whoever knows its file and row puts them in front."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: each with role and content, without keys whose value is None.
        first_learned: the number of the message from which on the assistant's turns are learned.
        unlearned: numbers of the assistant's messages that are not learned, whatever stands before them.
        tools: descriptions of functions, as JSON schemas.
        options: further variables for the template, for example `enable_thinking`.
    """

    messages: list[dict]
    first_learned: int = 0
    unlearned: frozenset[int] = frozenset()
    tools: list | None = None
    options: dict = field(default_factory=dict)

    def learned(self) -> list[int]:
        """The numbers of the messages that are learned."""
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and number >= self.first_learned and number not in self.unlearned
        ]


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it.

    Attributes:
        text: the whole.
        turns: the characters (start, end) of what is learned: of each message of the assistant its content and its end.
        quoted: the characters (start, end) where somebody wrote the name of a control token.
    """

    text: str
    turns: list[tuple[int, int]]
    quoted: list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenized:
    """A tokenised example: ids int32 (n,), targets bool (n,), and the UTF-8 bytes of what is learned."""

    ids: np.ndarray
    targets: np.ndarray
    target_bytes: int = 0


class ChatTemplate:
    """The chat template of a tokenizer, with what has to be known of it.

    Attributes:
        end: the token that ends a turn of the assistant; None for a template that writes none.
        generation_prompt: what is written for the model to continue, after the messages.
        control_tokens: {token: id} that belong to the template and the tokenizer alone: text never becomes one.
        markup_tokens: those of them that the assistant may write, such as `<think>`.
    """

    def __init__(self, tokenizer, where: str | None = None):
        """`where` names the template in messages: its file, or the tokenizer that it belongs to.

        Raises:
            UserError: it does not write a question and an answer.
        """
        where = where or f"the tokenizer {tokenizer.name_or_path}"
        self.tokenizer = tokenizer
        self.where = where
        self.source: str = with_fixed_date(tokenizer.chat_template)
        self.content_parts = False
        self._renamed: RenamedTokenizer | None = None
        try:
            text = self.render(PROBE)
            self.content_parts = ANSWER not in text
            text = self.render(PROBE)
        except ConversationError as error:
            raise UserError(f"the chat template of {where} cannot be used: a conversation {error}") from error
        if ANSWER not in text:
            raise UserError(f"the chat template of {where} does not write what the assistant says; correct it")
        self.generation_prompt = self._find_generation_prompt()
        header, trailer = self._around_answer(text)
        self._header_length = _prefix_in(self.generation_prompt, header)[1]
        added = tokenizer.added_tokens_decoder
        self._special = {token.content for token in added.values() if token.special}
        rendered = text + self.generation_prompt  # a template may put its tokens together from parts
        self.control_tokens = control_tokens(tokenizer) | {
            token.content: index
            for index, token in added.items()
            if token.content in rendered and not token.content.isspace()
        }
        self.markup_tokens = {token for token in self.control_tokens if is_markup(token, tokenizer)}
        if "</think>" in self.source:  # the template reads thoughts, whatever the tokenizer calls special
            self.markup_tokens |= {"<think>", "</think>"} & self.control_tokens.keys()
        self.control_pattern = _any_of(self.control_tokens)
        self.control_pattern_but_markup = _any_of(set(self.control_tokens) - self.markup_tokens)
        self._ends = _any_of(set(self.control_tokens) - self.markup_tokens)
        end = self._ends.search(trailer)
        self.end = end[0] if end else None
        # A call of a function may end differently from an answer, but not with what opens a turn.
        opening = text[: text.rindex(ANSWER)] + self.generation_prompt
        self._opening_tokens = set(self._ends.findall(opening)) - {self.end}
        self.marks_generation = bool(GENERATION_MARKER.search(self.source)) and bool(
            self._generation_regions(Conversation(PROBE), text)
        )

    def _find_generation_prompt(self) -> str:
        try:
            asked = self.render(PROBE[:1])
            prompted = self.render(PROBE[:1], add_generation_prompt=True)
        except ConversationError:  # a template may insist on an answer
            return ""
        return prompted[len(asked) :] if prompted.startswith(asked) else ""

    @staticmethod
    def _around_answer(text: str) -> tuple[str, str]:
        """What stands between question and answer, and after the answer."""
        position = text.rindex(ANSWER)
        question = text.rfind(QUESTION, 0, position)
        header = text[question + len(QUESTION) : position] if question >= 0 else text[:position]
        return header, text[position + len(ANSWER) :]

    # --- Rendering ---------------------------------------------------------------------------------------------------

    def knows_role(self, role: str) -> bool:
        """Whether a role is one that templates in general know, or one that this template mentions."""
        return role in STANDARD_ROLES or f"'{role}'" in self.source or f'"{role}"' in self.source

    def reads_key(self, key: str) -> bool:
        """Whether the template mentions a key of a message."""
        names = REASONING_KEYS if key in REASONING_KEYS else (key,)
        return any(re.search(rf"\.{name}\b|['\"]{name}['\"]", self.source) for name in names)

    @property
    def reads_tools(self) -> bool:
        """Whether the template mentions the variable with the descriptions of functions."""
        return bool(re.search(r"\btools\b", self.source))

    def render(self, messages: list[dict], tools=None, add_generation_prompt: bool = False, **options) -> str:
        """The text of a conversation.

        Raises:
            ConversationError: the template refuses it.
            UserError: it takes too much time or memory.
        """
        try:
            with rendering_limits(self.where):
                return self.tokenizer.apply_chat_template(
                    self._with_parts(messages),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self.source,
                    **options,
                )
        except (UserError, MemoryError):
            raise
        except Exception as error:  # templates raise what they like, for example over the order of the roles
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ConversationError(
                f"does not fit the chat template ({reason}); it has messages of {roles}: correct it or leave it out"
            ) from error

    def _with_parts(self, messages: list[dict]) -> list[dict]:
        if not self.content_parts:
            return messages
        return [
            message | {"content": [{"type": "text", "text": message["content"]}]} if "content" in message else message
            for message in messages
        ]

    def _generation_regions(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """The characters between the template's generation markers; none where they are not those of `text`."""
        with rendering_limits(self.where):
            rendered, regions = compat.render_with_generation_regions(
                self._with_parts(conversation.messages),
                self.source,
                conversation.tools,
                {**self.tokenizer.special_tokens_map, **conversation.options},
            )
        return [region for region in regions if region[1] > region[0]] if rendered == text else []

    # --- Where each message stands -----------------------------------------------------------------------------------

    def locate(self, conversation: Conversation) -> Rendered:
        """The text of a conversation, with the characters that are learned.

        Raises:
            ConversationError: the template refuses it, does not write a message, or it cannot be said where.
        """
        conversation, text = self._render_complete(conversation)
        marked = self._find_markers(conversation, text)
        self._check_written(conversation, marked)
        turns = [self._turn(conversation, marked, number) for number in conversation.learned()]
        if self.marks_generation:
            turns = self._within_regions(conversation, text, turns)
        return Rendered(text, turns, marked.quoted)

    def _render_complete(self, conversation: Conversation) -> tuple[Conversation, str]:
        """The text of a conversation, which gets empty contents where the template needs one in every message."""
        messages = conversation.messages
        try:
            return conversation, self.render(messages, conversation.tools, **conversation.options)
        except ConversationError:
            complete = [message if "content" in message else message | {"content": ""} for message in messages]
            if complete == messages:
                raise
            conversation = replace(conversation, messages=complete)
            return conversation, self.render(complete, conversation.tools, **conversation.options)

    def _find_markers(self, conversation: Conversation, text: str) -> "_Marked":
        """Render with markers, at first at the outer edges of each message, then inside of what is trimmed."""
        indents = [_indent(message.get("content", "")) for message in conversation.messages]
        for others in (True, False):  # a template may look at how a message begins
            marked = self._try_markers(conversation, text, [0] * len(indents), others)
            if marked is None and any(indents):
                marked = self._refine(conversation, text, indents, others)
            if marked is not None:
                return marked
        raise ConversationError("cannot be aligned with what the chat template writes; correct it or leave it out")

    def _refine(self, conversation: Conversation, text: str, indents: list[int], others: bool) -> "_Marked | None":
        """Markers after the white space that the template strips from the beginning of a message."""
        depths = list(indents)
        marked = self._try_markers(conversation, text, depths, others)
        if marked is None:
            return None
        for number in range(len(indents)):
            low = 0
            while low < depths[number]:  # what is stripped is a beginning of the white space: search by halves
                middle = (low + depths[number]) // 2
                closer = [*depths[:number], middle, *depths[number + 1 :]]
                better = self._try_markers(conversation, text, closer, others)
                if better is None:
                    low = middle + 1
                else:
                    marked, depths = better, closer
        return marked

    def _try_markers(self, conversation: Conversation, text: str, depths: list[int], others: bool) -> "_Marked | None":
        marking = _Marking(self, conversation, text)
        messages = [
            marking.mark_message(number, message, depths[number], others)
            for number, message in enumerate(conversation.messages)
        ]
        tools = marking.mark_quotes(conversation.tools, assistant=False)
        try:
            rendered = self.render(messages, tools, **conversation.options)
        except ConversationError:
            return None
        return marking.read(rendered)

    def _check_written(self, conversation: Conversation, marked: "_Marked") -> None:
        """Refuse messages that the template leaves out; of earlier turns it may leave out the reasoning."""
        last = max((n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"), default=-1)
        for (number, part), written in marked.parts.items():
            role = conversation.messages[number]["role"]
            if written or (part == "reasoning" and number != last):
                continue
            said = {
                "content": f"the message of the role {role!r}",
                "reasoning": "the reasoning of the last answer",
                "call": "its tool_calls",
            }[part]
            raise ConversationError(f"cannot be learned: the chat template does not write {said}; set another template")

    def _within_regions(
        self, conversation: Conversation, text: str, turns: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """What of each turn the template marks as generated. Markers around a header or an empty thought add nothing.

        Raises:
            ConversationError: there is nothing of a turn.
        """
        regions = self._generation_regions(conversation, text)
        parts = []
        for start, end in turns:
            of_turn = [(max(start, first), min(end, last)) for first, last in regions if first < end and last > start]
            if not of_turn:
                raise ConversationError(
                    f"cannot be learned: the chat template does not mark {text[start:end][:40]!r} with "
                    "{% generation %}; correct it or leave it out"
                )
            parts += of_turn
        return parts

    def _turn(self, conversation: Conversation, marked: "_Marked", number: int) -> tuple[int, int]:
        """From the first word that the model has to say to the token that ends its turn."""
        text, positions = marked.text, marked.positions(number)
        if not positions:
            raise ConversationError(f"cannot be learned: there is nothing in message {number}; leave it out")
        start = marked.content_start.get(number)
        if start is None or start > positions[0]:  # it begins by thinking, or calls a function
            start = self._after_header(conversation, marked, number, positions[0])
        later = [at for other in range(number + 1, len(conversation.messages)) for at in marked.positions(other)]
        limit = min((at for at in later if at >= positions[-1]), default=len(text))
        ends = [
            match
            for match in self._ends.finditer(text, positions[-1], limit)
            if not any(begin <= match.start() < end for begin, end in marked.quoted)
        ]
        plain_ends = [match for match in ends if match[0] == self.end]
        special = [match for match in ends if match[0] in self._special - self._opening_tokens]
        if not plain_ends and not special:
            raise ConversationError(
                f"cannot be learned: the chat template writes no token that ends message {number}; correct it or "
                "leave it out"
            )
        return start, (plain_ends or special)[0].end()

    def _after_header(self, conversation: Conversation, marked: "_Marked", number: int, first: int) -> int:
        """Where the model begins to write a message that begins with something else than its content."""
        text = marked.text
        earlier = [at for other in range(number) for at in marked.positions(other) if at <= first]
        begin = max(earlier, default=0)
        position, length = _prefix_in(self.generation_prompt, text[begin:first])
        if length >= self._header_length > 0:
            return begin + position + length
        plain = [*conversation.messages[:number], {"role": "assistant", "content": ANSWER}]
        try:
            other_text = self.render(plain, conversation.tools, **conversation.options)
        except ConversationError:
            return first
        return min(_common_prefix(text, other_text), first)

    # --- Tokens ------------------------------------------------------------------------------------------------------

    def tokenize(self, conversations: list[Rendered]) -> list[Tokenized | ConversationError]:
        """Ids and targets of rendered conversations, by the tokenizer's threads.

        Where nobody wrote the name of a control token, the ids are those of `apply_chat_template(tokenize=True)`.
        Where somebody did, that name is encoded as its characters.
        """
        texts = [
            self._spell_out(rendered) if rendered.quoted else (rendered.text, rendered.turns)
            for rendered in conversations
        ]
        encodings: list[EncodedText | None] = [None] * len(texts)
        for quoted in (False, True):
            numbers = [number for number, rendered in enumerate(conversations) if bool(rendered.quoted) == quoted]
            if not numbers:
                continue
            backend = self.renamed.backend if quoted else self.tokenizer.backend_tokenizer
            with bare_backend(backend):
                encoded = encode_texts(backend, [texts[number][0] for number in numbers], offsets=True)
            for number, encoding in zip(numbers, encoded, strict=True):
                encodings[number] = encoding
        return [
            self._targets(rendered, encoding, text, turns)
            for rendered, encoding, (text, turns) in zip(conversations, encodings, texts, strict=True)
        ]

    @property
    def renamed(self) -> RenamedTokenizer:
        """The tokenizer with other names for its control tokens, which no text contains."""
        if self._renamed is None:
            self._renamed = RenamedTokenizer(self.tokenizer, list(self.control_tokens))
        return self._renamed

    def _spell_out(self, rendered: Rendered) -> tuple[str, list[tuple[int, int]]]:
        """The text and its turns with other names for the control tokens that the template writes."""
        pieces, moves, end, length = [], [(0, 0)], 0, 0
        for match in self.control_pattern.finditer(rendered.text):
            if any(begin <= match.start() < stop for begin, stop in rendered.quoted):
                continue
            piece = rendered.text[end : match.start()] + self.renamed.names[match[0]]
            pieces.append(piece)
            end, length = match.end(), length + len(piece)
            moves.append((end, length))
        pieces.append(rendered.text[end:])
        before = np.array([move[0] for move in moves])

        def moved(position: int) -> int:
            index = int(np.searchsorted(before, position, side="right")) - 1
            return moves[index][1] + position - moves[index][0]

        return "".join(pieces), [(moved(start), moved(stop)) for start, stop in rendered.turns]

    def _targets(
        self, rendered: Rendered, encoded: EncodedText, text: str, turns: list[tuple[int, int]]
    ) -> Tokenized | ConversationError:
        ids = self.renamed.original_ids(encoded.ids) if rendered.quoted else encoded.ids
        starts, ends = encoded.offsets[:, 0], encoded.offsets[:, 1]
        targets = np.zeros(len(ids), dtype=bool)
        exact = self._decode(ids) == rendered.text
        size = 0
        for (start, end), (first, last) in zip(turns, rendered.turns, strict=True):
            inside = (starts < end) & (ends > start)
            inside |= (starts == ends) & (starts >= start) & (starts < end)
            problem = self._misaligned(text, starts[inside], ends[inside], start, end)
            expected = rendered.text[first:last]
            if not problem and exact and self._decode(ids[inside]).lstrip() != expected.lstrip():
                problem = f"the tokens of {expected[:40]!r} give another text"
            if problem:
                return ConversationError(f"cannot be aligned: {problem}; correct it or leave it out")
            targets |= inside
            size += len(expected.encode("utf-8", errors="replace"))
        return Tokenized(ids, targets, size)

    @staticmethod
    def _misaligned(text: str, starts: np.ndarray, ends: np.ndarray, start: int, end: int) -> str | None:
        """What is wrong with tokens at these characters that are to cover those from `start` to `end`."""
        if not len(starts):
            return f"no token belongs to {text[start:end][:40]!r}"
        first, last = int(starts.min()), int(ends.max())
        if text[min(first, start) : start].strip():
            return f"a token holds the beginning of {text[start:end][:40]!r} and what stands before it"
        if text[end : max(last, end)].strip():
            return f"a token holds the end of {text[start:end][-40:]!r} and what stands after it"
        covered = np.zeros(end - start + 1, dtype=np.int64)
        np.add.at(covered, np.clip(starts - start, 0, end - start), 1)
        np.add.at(covered, np.clip(ends - start, 0, end - start), -1)
        holes = np.flatnonzero(np.cumsum(covered)[:-1] == 0)
        if any(not text[start + hole].isspace() for hole in holes):
            return f"a part of {text[start:end][:40]!r} has no token"
        return None

    def _decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """The ids of messages and of what the model continues; the names of control tokens are characters."""
        conversation = Conversation(messages)
        try:
            text = self.render(messages, add_generation_prompt=True)
        except ConversationError as error:
            raise UserError(f"the conversation {error}") from error
        if not self._has_quotes(messages):
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        marking = _Marking(self, conversation, text)
        marked_messages = [marking.mark_quotes(message, message["role"] == "assistant") for message in messages]
        marked = marking.read(self.render(marked_messages, add_generation_prompt=True))
        if marked is None:
            raise UserError("the chat template looks at a control token in a message; leave it out of the message")
        return self.tokenize([Rendered(text, [], marked.quoted)])[0].ids.tolist()

    def _has_quotes(self, value) -> bool:
        return any(self.control_pattern.search(text) for text in _strings(value))


@dataclass
class _Marked:
    """Where the markers stand in the text without them."""

    text: str
    parts: dict[tuple[int, str], bool]  # (message, part): whether it is written
    content_start: dict[int, int]
    quoted: list[tuple[int, int]]
    edges: dict[int, list[int]]

    def positions(self, number: int) -> list[int]:
        """The characters at which something of a message begins or ends, in order."""
        return self.edges.get(number, [])


class _Marking:
    """Puts markers into a conversation and finds them in what is rendered of it."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, text: str):
        self.template = template
        self.text = text
        present = set(text)
        for value in (conversation.messages, conversation.tools):
            for string in _strings(value):
                present.update(string)
        self.fresh = (chr(code) for code in MARKERS if chr(code) not in present)
        self.owner: dict[str, tuple[int, str]] = {}  # marker: (message, what it marks)
        self.prefixes: dict[str, str] = {}  # marker: what stands before it in its message
        self.quotes: list[tuple[str, str, str]] = []

    def _marker(self, number: int, name: str) -> str:
        marker = next(self.fresh)
        self.owner[marker] = (number, name)
        return marker

    def mark_message(self, number: int, message: dict, depth: int, others: bool) -> dict:
        """A message with markers; without `others` only where the assistant speaks."""
        assistant = message["role"] == "assistant"
        marked = self.mark_quotes(message, assistant)
        if not assistant and not others:
            return marked
        content = message.get("content", "")
        if content.strip():
            marked["content"] = self._mark_content(number, content, depth, assistant)
        if not assistant:
            return marked
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str) and message[key].strip():
                before, core, after = _trimmed(message[key])
                marked[key] = before + self._marker(number, "reasoning") + self.mark_quotes(core, assistant) + after
        if isinstance(message.get("tool_calls"), list):
            marked["tool_calls"] = [self._mark_call(number, call) for call in marked["tool_calls"]]
        return marked

    def _mark_content(self, number: int, content: str, depth: int, assistant: bool) -> str:
        before, core, after = _trimmed(content)
        begin = before[:depth] + self._marker(number, "start") + before[depth:]
        end = self._marker(number, "end") + after
        thought = THINK.fullmatch(core) if assistant else None
        if not thought or not thought[4]:
            return begin + self.mark_quotes(core, assistant) + end
        opening, reasoning, closing, answer = thought.groups()
        middle = opening
        if reasoning:
            marker = self._marker(number, "thought")
            self.prefixes[marker] = opening
            middle += marker
        marker = self._marker(number, "answer")
        self.prefixes[marker] = opening + reasoning + closing
        middle += self.mark_quotes(reasoning, assistant) + closing + marker + self.mark_quotes(answer, assistant)
        return begin + middle + end

    def _mark_call(self, number: int, call):
        if not isinstance(call, dict):
            return call
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        if not isinstance(function.get("name"), str):
            return call
        named = function | {"name": self._marker(number, "call") + function["name"]}
        return named if function is call else call | {"function": named}

    def mark_quotes(self, value, assistant: bool):
        """A text, or all texts in a structure, with markers around the names of control tokens."""
        if isinstance(value, str):
            names = self.template.control_pattern_but_markup if assistant else self.template.control_pattern
            return names.sub(self._quote, value)
        if isinstance(value, dict):
            return {key: part if key == "role" else self.mark_quotes(part, assistant) for key, part in value.items()}
        if isinstance(value, list):
            return [self.mark_quotes(part, assistant) for part in value]
        return value

    def _quote(self, match: re.Match) -> str:
        begin, end = next(self.fresh), next(self.fresh)
        self.quotes.append((begin, match[0], end))
        return begin + match[0] + end

    def read(self, rendered: str) -> _Marked | None:
        """What the markers tell; None where they have changed the text."""
        known = {*self.owner, *(marker for begin, _, end in self.quotes for marker in (begin, end))}
        pieces: list[str] = []
        at: dict[str, list[int]] = {}
        end = length = 0
        for match in MARKER.finditer(rendered):
            if match[0] not in known:
                continue
            pieces.append(rendered[end : match.start()])
            length += match.start() - end
            end = match.end()
            at.setdefault(match[0], []).append(length)
        pieces.append(rendered[end:])
        if "".join(pieces) != self.text:
            return None
        edges: dict[int, list[int]] = {}
        content_start: dict[int, int] = {}
        parts: dict[tuple[int, str], bool] = {}
        for marker, (number, name) in self.owner.items():
            positions = at.get(marker, [])
            edges.setdefault(number, []).extend(positions)
            part = {"start": None, "end": "content", "answer": None, "thought": "reasoning"}.get(name, name)
            if part == "call":
                parts[number, part] = bool(positions) and parts.get((number, part), True)
            elif part:
                parts[number, part] = bool(positions) or parts.get((number, part), False)
            if not positions or name not in ("start", "thought", "answer"):
                continue
            prefix = self.prefixes.get(marker, "")
            if self.text[: positions[0]].endswith(prefix):
                content_start[number] = min(content_start.get(number, len(self.text)), positions[0] - len(prefix))
            elif name == "answer":
                content_start.setdefault(number, positions[0])
        for number, start in content_start.items():
            edges[number].append(start)
        quoted = [
            (first, first + len(name))
            for begin, name, end in self.quotes
            for first in at.get(begin, [])
            if first + len(name) in at.get(end, [])
        ]
        positions = {number: sorted(places) for number, places in edges.items()}
        return _Marked(self.text, parts, content_start, sorted(quoted), positions)


def _strings(value) -> Iterator[str]:
    """All texts in a structure."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _trimmed(text: str) -> tuple[str, str, str]:
    """(white space, text, white space)."""
    core = text.strip()
    before = text[: _indent(text)]
    return before, core, text[len(before) + len(core) :]


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _any_of(names) -> re.Pattern:
    """Matches any of the names, the longest first; without names, nothing."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _prefix_in(prompt: str, text: str) -> tuple[int, int]:
    """(position, length) of the longest beginning of `prompt` in `text`, the last one there; (-1, 0) without one."""
    for length in range(len(prompt), 0, -1):
        position = text.rfind(prompt[:length])
        if position >= 0:
            return position, length
    return -1, 0


def _common_prefix(first: str, second: str) -> int:
    """The number of characters with which both texts begin."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


# --- The template of a run -------------------------------------------------------------------------------------------


def set_chat_template(tokenizer, path: str | None) -> list[str]:
    """Give the tokenizer a chat template, and every token that it writes; its eos becomes what ends a turn.

    Args:
        path: a .jinja file; None for the tokenizer's own.

    Returns:
        The tokens that are new to the tokenizer, for which the embeddings have to grow.

    Raises:
        UserError: there is no template, or none that writes and teaches where a turn ends.
    """
    if path is not None:
        try:
            tokenizer.chat_template = read_small_file(path).rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"not UTF-8 text, byte {error.start}"
            raise UserError(f"chat_template: cannot read {path} ({reason}); {SHIPPED} is one") from error
    where = path or f"the tokenizer {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise UserError(f"{where} has no chat template; set chat_template, for example to {SHIPPED}")
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(tokenizer.chat_template)
        raise UserError(f"{where} has several chat templates ({names}); set chat_template to the file of one")
    written = dict.fromkeys(re.findall(r"<\|\w+\|>", tokenizer.chat_template))  # in order, each once
    known = tokenizer.get_vocab()
    # `bos_token != '<|im_start|>'` and the like mention tokens that this tokenizer need not have: render to be sure.
    try:
        with rendering_limits(where):
            sample = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template of {where} cannot be rendered ({reason}); correct it") from error
    new = [token for token in written if token not in known and token in sample]
    add_special_tokens(tokenizer, {"additional_special_tokens": new})
    template = ChatTemplate(tokenizer, where)
    end = _learned_end(template, where)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # what stops `generate`
    return new


def _learned_end(template: ChatTemplate, where: str) -> int:
    """The id of the last token that is learned of an answer."""
    tokenizer = template.tokenizer
    if template.end is None:
        raise UserError(
            f"the chat template of {where} writes no token after what the assistant says, so that no model would "
            f"learn where a turn ends; set chat_template to one that does, for example {SHIPPED}"
        )
    try:
        [tokenized] = template.tokenize([template.locate(Conversation(PROBE))])
    except ConversationError as error:
        raise UserError(f"the chat template of {where} cannot be used: a conversation {error}") from error
    if isinstance(tokenized, ConversationError):
        raise UserError(f"the chat template of {where} cannot be used: a conversation {tokenized}")
    end = int(tokenized.ids[np.flatnonzero(tokenized.targets)[-1]])
    if end not in tokenizer.added_tokens_decoder:
        raise UserError(
            f"the chat template of {where} does not teach where a turn ends (the last learned token is "
            f"{tokenizer.decode([end])!r}); move the token that ends it before {{% endgeneration %}}"
        )
    return end


def stop_at_end_of_turn(model, tokenizer) -> bool:
    """Make the model stop where the tokenizer's chat template ends a turn, and where it did; True when that is new."""
    before = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *([before] if isinstance(before, int) else before or [])}
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    return model.generation_config.eos_token_id != before


def parse_json_list(value, name: str) -> list | None:
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
