"""What a trained model answers: to the first prompts of its data, before and after a stage."""

import torch

from unlabeled.data.chat_templates import ChatTemplate
from unlabeled.data.conversations import Conversation, PlainText, read_example
from unlabeled.data.preferences import read_pair
from unlabeled.data.readers import read_rows
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.sources import Source
from unlabeled.data.text import error_summary
from unlabeled.data.tokenization import control_tokens, encode_batch
from unlabeled.errors import UserError


def first_prompts(sources: list[Source], count: int = 3) -> list[str]:
    """What the user says first in the first examples of the sources, each once, to show what a model answers.

    A prompt may be empty; without any, that is the only one.
    """
    prompts: list[str] = []
    for source in sources:
        for place, row in read_rows(source):
            is_pair = "chosen" in row and row.get("messages") is None
            prompt = _first_prompt(read_pair(row, place) if is_pair else read_example(row, place, None))
            if prompt not in prompts:
                prompts.append(prompt)
            if len(prompts) == count:
                return prompts
    return prompts or [""]


def _first_prompt(example) -> str:
    if isinstance(example, PlainText):
        return example.prompt
    messages = example.messages if isinstance(example, Conversation) else example.prompt
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[0] if said else messages[0].get("content", "") if messages else ""


def _render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    where = f"the tokenizer {tokenizer.name_or_path}"
    try:
        with rendering_limits(where):
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    except UserError:
        raise
    except Exception as error:  # templates raise what they like
        raise UserError(
            f"the chat template of {where} cannot be rendered ({error_summary(error)}); correct it"
        ) from error


@torch.no_grad()
def reply(
    model, tokenizer, prompt: str | list[dict], max_new_tokens: int = 100, sample: bool = False, seed: int = 0
) -> str:
    """The model's answer where the tokenizer has a chat template, else its continuation of the text.

    Greedy, or with `sample` drawn at temperature 0.8 and top-p 0.95 with the given seed. `prompt` may be the messages
    of a conversation. Of one that leaves no room in the model's positions the end is read.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        names = control_tokens(tokenizer)
        if any(name in message["content"] for message in messages for name in names):
            ids = ChatTemplate(tokenizer).encode_prompt(messages)  # as characters
        else:
            ids = _render_prompt(tokenizer, messages)
    else:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = [*([] if start is None else [start]), *encode_batch(tokenizer, [prompt])[0].tolist()]
        if not ids:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has neither a bos nor an eos token to begin with; name one in "
                "its tokenizer_config.json, or give a prompt"
            )
    if positions := getattr(model.config, "max_position_embeddings", None):
        max_new_tokens = min(max_new_tokens, max(positions - len(ids), positions // 4))
        ids = ids[-(positions - max_new_tokens) :]
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sample else {"do_sample": False}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    start = torch.tensor([ids], device=model.device)
    output = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, **how,
    )  # fmt: skip
    torch.set_rng_state(state)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def compare_replies(prompts: list[str], before, after, tokenizer) -> str:
    """Markdown: what two models answer to the same prompts, greedily."""
    lines = ["Greedy answers to the first held-out prompts, before and after this stage.", ""]
    for prompt in prompts:
        for heading, text in (
            ("Prompt", prompt),
            ("Before", reply(before, tokenizer, prompt, 60)),
            ("After", reply(after, tokenizer, prompt, 60)),
        ):
            lines += [f"**{heading}**", "", *(f"    {line}" for line in text.splitlines() or [""]), ""]
        lines += ["---", ""]
    return "\n".join(lines)
