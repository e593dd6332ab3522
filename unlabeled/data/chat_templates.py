"""The chat template of a run: setting it, and making tokenizer and model stop where it ends a turn."""

import re

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unlabeled.data.conversation import Conversation, ConversationError
from unlabeled.data.conversation_tokens import tokenize_rendered
from unlabeled.data.rendering import rendering_limits
from unlabeled.data.template_rendering import PROBE, ChatTemplate
from unlabeled.data.text import error_summary
from unlabeled.data.tokenization import add_special_tokens
from unlabeled.data.turn_location import locate_turns
from unlabeled.errors import UserError
from unlabeled.runtime.files import read_small_file

SHIPPED = "recipes/templates/chatml.jinja"
TOKEN_NAME = re.compile(r"<\|\w+\|>")


def set_chat_template(tokenizer: PreTrainedTokenizerFast, path: str | None) -> list[str]:
    """Give the tokenizer a chat template and every token that it writes. Its eos becomes the token that ends a turn.

    Args:
        tokenizer: changed in place.
        path: a .jinja file; None for the tokenizer's own template.

    Returns:
        The tokens that are new to the tokenizer, for which the embeddings have to grow.

    Raises:
        UserError: there is no template, or none that writes and teaches where a turn ends.
    """
    if path is not None:
        try:
            tokenizer.chat_template = read_small_file(path).rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"chat_template: cannot read {path} (not UTF-8 text, byte {error.start}); {SHIPPED} is one"
            ) from error
        except OSError as error:
            raise UserError(f"chat_template: cannot read {path} ({error.strerror}); {SHIPPED} is one") from error
    where = path or f"the tokenizer {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise UserError(f"{where} has no chat template; set chat_template, for example to {SHIPPED}")
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(tokenizer.chat_template)
        raise UserError(f"{where} has several chat templates ({names}); set chat_template to the file of one")
    new_tokens = _find_new_tokens(tokenizer, where)
    add_special_tokens(tokenizer, {"additional_special_tokens": new_tokens})
    end_id = _find_learned_end(ChatTemplate(tokenizer, where))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_id)  # what stops `generate`
    return new_tokens


def _find_new_tokens(tokenizer: PreTrainedTokenizerFast, where: str) -> list[str]:
    """The tokens that the template writes and the tokenizer lacks.

    A template may mention tokens that it does not write, as in `bos_token != '<|im_start|>'`: rendering tells.
    """
    try:
        with rendering_limits(where):
            rendered = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # templates raise anything
        raise UserError(
            f"the chat template of {where} cannot be rendered ({error_summary(error)}); correct it"
        ) from error
    vocabulary = tokenizer.get_vocab()
    mentioned = dict.fromkeys(TOKEN_NAME.findall(tokenizer.chat_template))  # in order, each once
    return [token for token in mentioned if token not in vocabulary and token in rendered]


def _find_learned_end(template: ChatTemplate) -> int:
    """The id of the last token that is learned of an answer."""
    tokenizer = template.tokenizer
    if template.end is None:
        raise UserError(
            f"the chat template of {template.where} writes no token after what the assistant says, so that no model "
            f"would learn where a turn ends; set chat_template to one that does, for example {SHIPPED}"
        )
    try:
        [tokenized] = tokenize_rendered(template, [locate_turns(template, Conversation(PROBE))])
        if isinstance(tokenized, ConversationError):
            raise tokenized
    except ConversationError as error:
        raise UserError(f"the chat template of {template.where} cannot be used: a conversation {error}") from error
    end_id = int(tokenized.ids[np.flatnonzero(tokenized.targets)[-1]])
    if end_id not in tokenizer.added_tokens_decoder:
        raise UserError(
            f"the chat template of {template.where} does not teach where a turn ends (the last learned token is "
            f"{tokenizer.decode([end_id])!r}); move the token that ends it before {{% endgeneration %}}"
        )
    return end_id


def stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Make the model stop generating where the chat template ends a turn, besides where it stopped before.

    Returns:
        Whether the end of a turn is new to the model.
    """
    old_eos = model.generation_config.eos_token_id
    old_ids = [old_eos] if isinstance(old_eos, int) else old_eos or []
    eos_ids = {tokenizer.eos_token_id, *old_ids}
    model.generation_config.eos_token_id = sorted(eos_ids) if len(eos_ids) > 1 else tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    return model.generation_config.eos_token_id != old_eos
