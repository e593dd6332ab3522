"""Where the turns of the assistant stand in what a chat template writes, and which characters of them are learned."""

from dataclasses import replace

from unlabeled.data.conversation import Conversation, ConversationError, RenderedConversation
from unlabeled.data.message_markers import MarkedText, MessageMarkers, indentation
from unlabeled.data.template_rendering import ANSWER, ChatTemplate, last_prefix_match

DESCRIPTIONS = {"reasoning": "the reasoning of the last answer", "call": "its tool_calls"}  # of parts of a message


def locate_turns(template: ChatTemplate, conversation: Conversation) -> RenderedConversation:
    """Render a conversation and find the characters that are learned.

    Raises:
        ConversationError: the template refuses the conversation, does not write a message, or it is not clear where.
    """
    conversation, text = _render_complete(template, conversation)
    marked = _mark(template, conversation, text)
    _check_written(conversation, marked)
    turns = [_locate_turn(template, conversation, marked, number) for number in conversation.learned()]
    if template.marks_generation:
        turns = _restrict_to_generation(template, conversation, text, turns)
    return RenderedConversation(text, turns, marked.quoted)


def _render_complete(template: ChatTemplate, conversation: Conversation) -> tuple[Conversation, str]:
    """The text of a conversation. Messages get an empty content where the template needs one in every message."""
    messages = conversation.messages
    try:
        return conversation, template.render(messages, conversation.tools, **conversation.options)
    except ConversationError:
        complete = [message if "content" in message else message | {"content": ""} for message in messages]
        if complete == messages:
            raise
        conversation = replace(conversation, messages=complete)
        return conversation, template.render(complete, conversation.tools, **conversation.options)


# --- Where each message stands ----------------------------------------------------------------------------------------


def _mark(template: ChatTemplate, conversation: Conversation, text: str) -> MarkedText:
    """Render with markers, first at the outer edges of each message, then inside of the white space that is trimmed."""
    indentations = [indentation(message.get("content", "")) for message in conversation.messages]
    for mark_others in (True, False):  # a template may look at how a message of another role starts
        outermost = [0] * len(indentations)
        marked = _try_markers(template, conversation, text, outermost, mark_others)
        if marked is None and any(indentations):
            marked = _refine_depths(template, conversation, text, indentations, mark_others)
        if marked is not None:
            return marked
    raise ConversationError("cannot be aligned with what the chat template writes; correct it or leave it out")


def _refine_depths(
    template: ChatTemplate, conversation: Conversation, text: str, indentations: list[int], mark_others: bool
) -> MarkedText | None:
    """Markers after the leading white space that the template strips from a message, found by binary search."""
    depths = list(indentations)
    marked = _try_markers(template, conversation, text, depths, mark_others)
    if marked is None:
        return None
    for number in range(len(depths)):
        low = 0
        while low < depths[number]:
            middle = (low + depths[number]) // 2
            closer = [*depths[:number], middle, *depths[number + 1 :]]
            better = _try_markers(template, conversation, text, closer, mark_others)
            if better is None:
                low = middle + 1
            else:
                marked = better
                depths = closer
    return marked


def _try_markers(
    template: ChatTemplate, conversation: Conversation, text: str, depths: list[int], mark_others: bool
) -> MarkedText | None:
    """What the markers tell, or None if the template refuses them or they change the text."""
    markers = MessageMarkers(template, conversation, text)
    messages = [
        markers.mark_message(number, message, depths[number], mark_others)
        for number, message in enumerate(conversation.messages)
    ]
    tools = markers.mark_quotes(conversation.tools, is_assistant=False)
    try:
        rendered = template.render(messages, tools, **conversation.options)
    except ConversationError:
        return None
    return markers.read(rendered)


def _check_written(conversation: Conversation, marked: MarkedText) -> None:
    """Refuse messages that the template leaves out. It may leave out the reasoning of earlier turns."""
    answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    last_answer = max(answers, default=-1)
    for (number, part), is_written in marked.is_written.items():
        if is_written or (part == "reasoning" and number != last_answer):
            continue
        role = conversation.messages[number]["role"]
        description = DESCRIPTIONS.get(part, f"the message of the role {role!r}")
        raise ConversationError(
            f"cannot be learned: the chat template does not write {description}; set another template"
        )


# --- Which characters are learned -------------------------------------------------------------------------------------


def _locate_turn(
    template: ChatTemplate, conversation: Conversation, marked: MarkedText, number: int
) -> tuple[int, int]:
    """The characters from the first word that the model has to write to the token that ends its turn."""
    positions = marked.positions(number)
    if not positions:
        raise ConversationError(f"cannot be learned: there is nothing in message {number}; leave it out")
    start = marked.content_start.get(number)
    if start is None or start > positions[0]:  # the message starts with reasoning, or with a call
        start = _find_header_end(template, conversation, marked, number, positions[0])
    return start, _find_turn_end(template, conversation, marked, number, positions[-1])


def _find_turn_end(
    template: ChatTemplate, conversation: Conversation, marked: MarkedText, number: int, last: int
) -> int:
    """The end of the token that ends a turn, of which the character `last` is the last one that is known."""
    later_messages = range(number + 1, len(conversation.messages))
    later = [position for other in later_messages for position in marked.positions(other) if position >= last]
    limit = min(later, default=len(marked.text))
    candidates = [
        match
        for match in template.end_pattern.finditer(marked.text, last, limit)
        if not any(start <= match.start() < end for start, end in marked.quoted)
    ]
    for match in candidates:
        if match[0] == template.end:
            return match.end()
    for match in candidates:
        if match[0] in template.special_tokens - template.opening_tokens:
            return match.end()
    raise ConversationError(
        f"cannot be learned: the chat template writes no token that ends message {number}; correct it or leave it out"
    )


def _find_header_end(
    template: ChatTemplate, conversation: Conversation, marked: MarkedText, number: int, first: int
) -> int:
    """The character at which the model starts to write a message that does not start with its content.

    Args:
        template: the chat template.
        conversation: the conversation.
        marked: its rendered text.
        number: of the message.
        first: the first known character of the message.
    """
    earlier = [position for other in range(number) for position in marked.positions(other) if position <= first]
    previous_end = max(earlier, default=0)
    position, length = last_prefix_match(template.generation_prompt, marked.text[previous_end:first])
    if length >= template.header_length > 0:
        return previous_end + position + length
    # The text with a plain answer instead differs from where the message starts.
    with_plain_answer = [*conversation.messages[:number], {"role": "assistant", "content": ANSWER}]
    try:
        other_text = template.render(with_plain_answer, conversation.tools, **conversation.options)
    except ConversationError:
        return first
    return min(_common_prefix_length(marked.text, other_text), first)


def _restrict_to_generation(
    template: ChatTemplate, conversation: Conversation, text: str, turns: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The parts of each turn between generation tags. Tags around a header or an empty thought add nothing.

    Raises:
        ConversationError: there is nothing of a turn between tags.
    """
    regions = template.generation_regions(conversation, text)
    restricted = []
    for start, end in turns:
        parts = [
            (max(start, region_start), min(end, region_end))
            for region_start, region_end in regions
            if region_start < end and region_end > start
        ]
        if not parts:
            raise ConversationError(
                f"cannot be learned: the chat template does not mark {text[start:end][:40]!r} with "
                "{% generation %}; correct it or leave it out"
            )
        restricted += parts
    return restricted


def _common_prefix_length(first: str, second: str) -> int:
    """The number of characters with which both texts start."""
    shorter = min(len(first), len(second))
    for index in range(shorter):
        if first[index] != second[index]:
            return index
    return shorter
