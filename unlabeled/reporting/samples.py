"""Samples of a fine-tuned model: its replies to the first prompts of the data, before and after training."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlabeled.data.conversation import Conversation
from unlabeled.data.messages import PlainText, read_example
from unlabeled.data.preferences import read_pair
from unlabeled.data.readers import read_rows
from unlabeled.data.sources import Source
from unlabeled.models.generation import reply

SAMPLE_TOKENS = 60


def first_prompts(sources: list[Source], count: int = 3) -> list[str]:
    """The first user messages of the first examples of the sources, without repetitions.

    Args:
        sources: conversations, prompts with completions, plain text, or preference pairs.
        count: the maximum number of prompts.

    Returns:
        1 to `count` prompts. A prompt may be empty; without any examples, that is the only one.
    """
    prompts: list[str] = []
    for source in sources:
        for location, row in read_rows(source):
            is_pair = "chosen" in row and row.get("messages") is None
            example = read_pair(row, location) if is_pair else read_example(row, location, None)
            prompt = _first_prompt(example)
            if prompt not in prompts:
                prompts.append(prompt)
            if len(prompts) == count:
                return prompts
    return prompts or [""]


def _first_prompt(example) -> str:
    if isinstance(example, PlainText):
        return example.prompt
    messages = example.messages if isinstance(example, Conversation) else example.prompt
    for message in messages:
        if message["role"] == "user":
            return message["content"]
    return messages[0].get("content", "") if messages else ""


def compare_replies(
    prompts: list[str], before: PreTrainedModel, after: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Markdown with the greedy replies of two models to the same prompts."""
    lines = ["Greedy answers to the first held-out prompts, before and after this stage.", ""]
    for prompt in prompts:
        sections = {
            "Prompt": prompt,
            "Before": reply(before, tokenizer, prompt, SAMPLE_TOKENS),
            "After": reply(after, tokenizer, prompt, SAMPLE_TOKENS),
        }
        for heading, text in sections.items():
            lines += [f"**{heading}**", ""]
            lines += [f"    {line}" for line in text.splitlines() or [""]]
            lines.append("")
        lines += ["---", ""]
    return "\n".join(lines)
