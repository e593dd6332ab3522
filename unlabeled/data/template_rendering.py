"""Rendering conversations with the chat template of a tokenizer, and what has to be known of the template."""

import json
import re
from collections.abc import Collection
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerFast

from unlabeled import compat
from unlabeled.data.control_tokens import RenamedTokenizer, control_tokens, is_markup
from unlabeled.data.conversation import Conversation, ConversationError
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.text import error_summary
from unlabeled.errors import UserError

# The probe: a conversation whose parts are easy to find in what a template writes.
QUESTION = "question"
ANSWER = "answer"
PROBE = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
STANDARD_ROLES = ("system", "user", "assistant", "tool")
# transformers hands a template each of these names of the same thing.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys of a message that hold something to be said. Other keys are handed to the template, which may ignore them.
SPOKEN_KEYS = ("tool_calls", "function_call", *REASONING_KEYS, "refusal", "audio", "images", "videos")
GENERATION_TAG = re.compile(r"{%-?\s*generation\s*-?%}")
# Templates such as Llama 3's write today's date. Data prepared on another day must be the same, so the date is fixed.
TEMPLATE_DATE = datetime(2024, 7, 26)
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def with_fixed_date(template: str) -> str:
    """Replace calls for today's date, in a format of `datetime.strftime`, by `TEMPLATE_DATE`."""

    def fixed_date(call: re.Match) -> str:
        return json.dumps(TEMPLATE_DATE.strftime(call[2]), ensure_ascii=False)

    return DATE_CALL.sub(fixed_date, template)


class ChatTemplate:
    """The chat template of a tokenizer.

    A template is a program that may trim, move or drop what it is given. What has to be known of it is found by
    rendering a question and an answer.

    Args:
        tokenizer: with its chat template.
        where: the name of the template in messages: its file, or the tokenizer that it belongs to.

    Attributes:
        source: the template in Jinja, with a fixed date.
        content_parts: whether contents have to be lists of parts.
        generation_prompt: what is written after the messages for the model to continue.
        header_length: characters of the generation prompt in front of an answer.
        end: the token that ends a turn of the assistant; None for a template that writes none.
        control_tokens: {token: id} that belong to the template and the tokenizer alone: no text becomes one.
        markup_tokens: those of them that the assistant may write, such as `<think>`.
        special_tokens: those that the tokenizer calls special.
        opening_tokens: those in front of an answer, without `end`.
        marks_generation: whether the template marks the assistant's text with {% generation %}.

    Raises:
        UserError: the template does not write a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, where: str | None = None):
        self.tokenizer = tokenizer
        self.where = where or f"the tokenizer {tokenizer.name_or_path}"
        self.source: str = with_fixed_date(tokenizer.chat_template)
        self.content_parts = False
        self._renamed: RenamedTokenizer | None = None
        text = self._render_probe()
        self.generation_prompt = self._find_generation_prompt()
        header, trailer = _split_around_answer(text)
        self.header_length = last_prefix_match(self.generation_prompt, header)[1]
        self._find_control_tokens(text)
        end = self.end_pattern.search(trailer)
        self.end = end[0] if end else None
        # The call of a function may end differently from an answer, but not with a token that opens a turn.
        opening = text[: text.rindex(ANSWER)] + self.generation_prompt
        self.opening_tokens = set(self.end_pattern.findall(opening)) - {self.end}
        self.marks_generation = bool(GENERATION_TAG.search(self.source)) and bool(
            self.generation_regions(Conversation(PROBE), text)
        )

    def _render_probe(self) -> str:
        try:
            text = self.render(PROBE)
            self.content_parts = ANSWER not in text
            text = self.render(PROBE)
        except ConversationError as error:
            raise UserError(f"the chat template of {self.where} cannot be used: a conversation {error}") from error
        if ANSWER not in text:
            raise UserError(f"the chat template of {self.where} does not write what the assistant says; correct it")
        return text

    def _find_generation_prompt(self) -> str:
        try:
            question = self.render(PROBE[:1])
            prompted = self.render(PROBE[:1], add_generation_prompt=True)
        except ConversationError:  # a template may insist on an answer
            return ""
        return prompted[len(question) :] if prompted.startswith(question) else ""

    def _find_control_tokens(self, text: str) -> None:
        added = self.tokenizer.added_tokens_decoder
        self.special_tokens = {token.content for token in added.values() if token.special}
        rendered = text + self.generation_prompt  # a template may compose the names of its tokens
        self.control_tokens = control_tokens(self.tokenizer) | {
            token.content: token_id
            for token_id, token in added.items()
            if token.content in rendered and not token.content.isspace()
        }
        self.markup_tokens = {token for token in self.control_tokens if is_markup(token, self.tokenizer)}
        if "</think>" in self.source:  # the template reads reasoning, whatever the tokenizer calls special
            self.markup_tokens |= {"<think>", "</think>"} & self.control_tokens.keys()
        self.control_pattern = _any_of(self.control_tokens)
        self.end_pattern = _any_of(self.control_tokens.keys() - self.markup_tokens)

    @property
    def renamed(self) -> RenamedTokenizer:
        """The tokenizer with other names for its control tokens, which no text contains."""
        if self._renamed is None:
            self._renamed = RenamedTokenizer(self.tokenizer, list(self.control_tokens))
        return self._renamed

    def knows_role(self, role: str) -> bool:
        """Whether a role is a standard one, or one that this template mentions."""
        return role in STANDARD_ROLES or f"'{role}'" in self.source or f'"{role}"' in self.source

    def reads_key(self, key: str) -> bool:
        """Whether the template mentions a key of a message."""
        names = REASONING_KEYS if key in REASONING_KEYS else (key,)
        return any(re.search(rf"\.{name}\b|['\"]{name}['\"]", self.source) for name in names)

    @property
    def reads_tools(self) -> bool:
        """Whether the template mentions the variable with the descriptions of functions."""
        return bool(re.search(r"\btools\b", self.source))

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False, **options: Any
    ) -> str:
        """The text of a conversation.

        Raises:
            ConversationError: the template refuses it.
            UserError: it takes too much time or memory.
        """
        try:
            with rendering_limits(self.where):
                return self.tokenizer.apply_chat_template(
                    self._with_content_parts(messages),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self.source,
                    **options,
                )
        except (UserError, MemoryError):
            raise
        except Exception as error:  # templates raise anything, for example over the order of the roles
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ConversationError(
                f"does not fit the chat template ({error_summary(error)}); it has messages of {roles}: correct it or "
                "leave it out"
            ) from error

    def _with_content_parts(self, messages: list[dict]) -> list[dict]:
        if not self.content_parts:
            return messages
        converted = []
        for message in messages:
            if "content" in message:
                message = message | {"content": [{"type": "text", "text": message["content"]}]}
            converted.append(message)
        return converted

    def generation_regions(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """The characters (start, end) between the template's generation tags; none unless the text is `text`."""
        with rendering_limits(self.where):
            rendered, regions = compat.render_with_generation_regions(
                self._with_content_parts(conversation.messages),
                self.source,
                conversation.tools,
                {**self.tokenizer.special_tokens_map, **conversation.options},
            )
        if rendered != text:
            return []
        return [(start, end) for start, end in regions if end > start]


def _split_around_answer(text: str) -> tuple[str, str]:
    """What stands between question and answer of the probe, and after the answer."""
    position = text.rindex(ANSWER)
    question = text.rfind(QUESTION, 0, position)
    header = text[question + len(QUESTION) : position] if question >= 0 else text[:position]
    return header, text[position + len(ANSWER) :]


def last_prefix_match(prompt: str, text: str) -> tuple[int, int]:
    """(position, length) of the last occurrence in `text` of the longest possible prefix of `prompt`, else (-1, 0)."""
    for length in range(len(prompt), 0, -1):
        position = text.rfind(prompt[:length])
        if position >= 0:
            return position, length
    return -1, 0


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """A pattern that matches any of the names, longer ones first; without names, nothing."""
    alternatives = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
    return re.compile("|".join(alternatives) or "(?!)")
