"""Conversations in the stages between a row of a data set and tokens."""

from dataclasses import dataclass, field

import numpy as np


class ConversationError(ValueError):
    """What is wrong with a conversation. The message is completed by the name of its file and row."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: each with role and content, without keys whose value is None.
        first_learned: the number of the message from which on the assistant's turns are learned.
        unlearned: numbers of messages of the assistant that are not learned in any case.
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
class RenderedConversation:
    """A conversation as its template writes it.

    Attributes:
        text: the whole text.
        turns: the characters (start, end) of what is learned: the content and the end of each learned message.
        quoted: the characters (start, end) where a message contains the name of a control token.
    """

    text: str
    turns: list[tuple[int, int]]
    quoted: list[tuple[int, int]]


@dataclass(frozen=True)
class TokenizedConversation:
    """A conversation as tokens.

    Attributes:
        ids: int32 (tokens,).
        targets: bool (tokens,), True where a token is learned.
        target_bytes: UTF-8 bytes of what is learned.
    """

    ids: np.ndarray
    targets: np.ndarray
    target_bytes: int = 0
