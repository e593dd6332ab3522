"""Text from trained models: answers and continuations, and what masked and span models fill in."""

import os
import re
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from unlabeled.data.control_tokens import control_tokens
from unlabeled.data.conversation_tokens import encode_prompt
from unlabeled.data.fim import FIM_TOKENS
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.span_corruption import sentinel_ids, spans_by_sentinel
from unlabeled.data.template_rendering import ChatTemplate
from unlabeled.data.text import error_summary
from unlabeled.data.tokenization import encode_batch, framing, load_tokenizer, vocabulary_size
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import adapter_base
from unlabeled.models.configs import check_positions
from unlabeled.models.exports import load_and_check_export
from unlabeled.runtime.safe_loading import check_foreign_code

TEMPERATURE = 0.8
TOP_P = 0.95
CANDIDATES = 5  # tokens that `fill_masks` lists for each mask
BLANK = re.compile(r"(?<![^\W_])_+(?![^\W_])")  # one or more _, but not in snake_case


# --- Loading ----------------------------------------------------------------------------------------------------------


class LoadedModel(NamedTuple):
    """A trained model with its tokenizer."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    is_masked: bool  # a masked language model, such as BERT


def load_for_generation(folder: str, device: str | None = None) -> LoadedModel:
    """Load the language model of a folder, with its adapter if it is one, and its tokenizer.

    Args:
        folder: output_dir of a finished run.
        device: where to put the model; by default a GPU if there is one.

    Raises:
        UserError: there is no such folder, it holds no language model, or it cannot be loaded.
    """
    remedy = "name the output_dir of a finished run"
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; {remedy}")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} holds no model; {remedy}")
    disable_progress_bar()  # it is done before anyone has read it
    try:
        auto_class = _auto_class_of(folder)
        model = load_and_check_export(auto_class, folder)
    except UserError:
        raise
    except Exception as error:  # a dozen kinds: torn weights, a base model that is gone
        raise UserError(f"{folder} cannot be loaded ({first_line(error)}); train or export it again") from error
    tokenizer = load_tokenizer(folder)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has ids up to {vocabulary_size(tokenizer) - 1:,}, but its model has only "
            f"{model.config.vocab_size:,} embeddings; put the tokenizer there that it was trained with"
        )
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedModel(model, tokenizer, is_masked=auto_class is AutoModelForMaskedLM)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")[:300]


def _auto_class_of(folder: str) -> type:
    """The auto class for the architecture that a folder's config.json, or that of its base model, names."""
    base = adapter_base(folder)
    check_foreign_code(base or folder, base or folder)
    config = AutoConfig.from_pretrained(base or folder, trust_remote_code=False)
    architecture = (config.architectures or ["model of no known kind"])[0]
    if config.is_encoder_decoder and architecture.endswith("ForConditionalGeneration"):
        return AutoModelForSeq2SeqLM
    if architecture.endswith("ForMaskedLM"):
        return AutoModelForMaskedLM
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    raise UserError(
        f"{folder} holds a {architecture}, neither a causal nor a masked language model, nor an encoder-decoder; "
        "name the output_dir of a finished run"
    )


# --- Answers and continuations ----------------------------------------------------------------------------------------


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    max_new_tokens: int = 100,
    sample: bool = False,
    seed: int = 0,
) -> str:
    """The model's answer if the tokenizer has a chat template, otherwise its continuation of the text.

    A prompt that does not fit into the model's positions is cut at its beginning. The random state is left as it was.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: text, or with a chat template the messages of a conversation.
        max_new_tokens: the maximum number of tokens to generate.
        sample: sample at temperature 0.8 and top-p 0.95; greedy otherwise.
        seed: for sampling.

    Raises:
        UserError: the chat template cannot be rendered, or there is no token to start with.
    """
    ids = _encode_prompt(tokenizer, prompt)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        max_new_tokens = min(max_new_tokens, max(positions - len(ids), positions // 4))
        ids = ids[-(positions - max_new_tokens) :]
    random_state = torch.get_rng_state()
    output = _generate(model, tokenizer, ids, max_new_tokens, sample, seed)
    torch.set_rng_state(random_state)
    return tokenizer.decode(output[len(ids) :], skip_special_tokens=True)


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int = 100,
    sample: bool = False,
    seed: int = 0,
) -> list[int]:
    """The ids that a model generates after `ids`, up to its end token.

    Args:
        model: a causal language model, or an encoder-decoder, which reads `ids` in its encoder.
        tokenizer: its tokenizer.
        ids: the tokens of the prompt.
        max_new_tokens: the maximum number of tokens to generate.
        sample: sample at temperature 0.8 and top-p 0.95; greedy otherwise.
        seed: for sampling.

    Raises:
        UserError: `ids` are longer than the model's positions.
    """
    is_encoder_decoder = model.config.is_encoder_decoder
    check_positions(model.config, len(ids) if is_encoder_decoder else len(ids) + 1)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and not is_encoder_decoder:
        max_new_tokens = min(max_new_tokens, positions - len(ids))
    output = _generate(model, tokenizer, ids, max_new_tokens, sample, seed)
    prompt_length = 1 if is_encoder_decoder else len(ids)  # a decoder starts with one token of its own
    generated = output[prompt_length:]
    if tokenizer.eos_token_id in generated:
        return generated[: generated.index(tokenizer.eos_token_id)]
    return generated


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    sample: bool,
    seed: int,
) -> list[int]:
    """`model.generate` for one prompt: the ids that it returns, for causal models with the prompt."""
    options: dict[str, Any] = {"do_sample": False}
    if sample:
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
    torch.manual_seed(seed)
    input_ids = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return output[0].tolist()


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    if not tokenizer.chat_template and isinstance(prompt, str):
        return _encode_text(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    names = control_tokens(tokenizer)
    if any(name in message["content"] for message in messages for name in names):
        return encode_prompt(ChatTemplate(tokenizer), messages)  # names of control tokens in a message are text
    return _render_prompt(tokenizer, messages)


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = encode_batch(tokenizer, [text])[0].tolist()
    if start is not None:
        ids = [start, *ids]
    if not ids:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has neither a bos nor an eos token to begin with; name one in "
            "its tokenizer_config.json, or give a prompt"
        )
    return ids


def _render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    origin = f"the tokenizer {tokenizer.name_or_path}"
    try:
        with rendering_limits(origin):
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    except UserError:
        raise
    except Exception as error:  # templates may raise anything
        raise UserError(
            f"the chat template of {origin} cannot be rendered ({error_summary(error)}); correct it"
        ) from error


# --- Filling in -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_masks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Fill each `_` or mask token of the prompt with the most likely token of a masked language model.

    Returns:
        The filled text, then a line for each mask with its five most likely tokens and their probabilities.

    Raises:
        UserError: there is no mask, or the prompt is longer than the model's positions.
    """
    text = BLANK.sub(tokenizer.mask_token, prompt)
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    ids = inputs["input_ids"][0]
    masks = (ids == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    if not masks:
        raise UserError(
            f"there is nothing to fill in {prompt!r}; put _ or {tokenizer.mask_token} where a token is missing"
        )
    check_positions(model.config, len(ids))
    top = model(**inputs).logits[0, masks].softmax(-1).topk(CANDIDATES)
    ids[masks] = top.indices[:, 0]
    lines = [tokenizer.decode(ids, skip_special_tokens=True)]
    for probabilities, candidates in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        tokens = [tokenizer.decode([candidate]) for candidate in candidates]
        entries = [f"{token} {probability:.0%}" for token, probability in zip(tokens, probabilities, strict=True)]
        lines.append("  " + ", ".join(entries))
    return "\n".join(lines)


def fill_spans(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> str:
    """Fill each `_` or sentinel of the prompt with what an encoder-decoder restores for it.

    A sentinel that the model does not mention stays in the text.

    Args:
        model: an encoder-decoder trained on span corruption.
        tokenizer: with sentinels.
        prompt: text with `_` or `<extra_id_0>` where words are missing.
        options: arguments of `generate_tokens`.

    Raises:
        UserError: nothing is missing, or more spans than the tokenizer has sentinels for.
    """
    sentinels = sentinel_ids(tokenizer)
    # mT5's sentinels begin with a space. A token includes the space before it, so a missing span does as well.
    names = iter([token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(sentinels)])
    text, blanks = re.subn(rf" ?(?:{BLANK.pattern}|<extra_id_\d+>)", lambda _: next(names, ""), prompt)
    if not 0 < blanks <= len(sentinels):
        raise UserError(f"{prompt!r} leaves out {blanks} spans; put _ where words lack, 1 to {len(sentinels)} times")
    ids = tokenizer(text)["input_ids"]
    spans = spans_by_sentinel(generate_tokens(model, tokenizer, ids, **options), sentinels)
    filled: list[int] = []
    for token in ids:
        filled += spans.get(token, [token])
    return tokenizer.decode([token for token in filled if token != tokenizer.eos_token_id])


def fill_middle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> str:
    """Fill the only `_` of the prompt with a causal model that was trained with `fim_rate`.

    The prompt is given as prefix, suffix and middle (PSM; Bavarian et al. 2022, arXiv:2207.14255).

    Args:
        model: a causal language model.
        tokenizer: with the tokens `FIM_TOKENS`.
        prompt: text with one `_`.
        options: arguments of `generate_tokens`.
    """
    before, after = BLANK.split(prompt)
    before_ids, after_ids = (ids.tolist() for ids in encode_batch(tokenizer, [before, after]))
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))
    ids = [framing(tokenizer, "clm").prefix_id, prefix, *before_ids, suffix, *after_ids, middle]
    filled = tokenizer.decode(generate_tokens(model, tokenizer, ids, **options), skip_special_tokens=True)
    return f"{before}{filled}{after}"
