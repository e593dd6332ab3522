"""Control tokens: added tokens that steer a model, and that no text may turn into."""

import hashlib
import json
import re
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

PIPED_NAME = re.compile(r"<[|｜][^<>]+[|｜]>")  # such as <|im_end|>; DeepSeek uses the full-width bar
TAG = re.compile(r"</?(\w+)>")


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """{token: id} of the added tokens that control a model, whether or not the tokenizer calls them special.

    These are all special tokens, those of the form `<|name|>`, and those that the chat template writes.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or PIPED_NAME.fullmatch(token.content)
        or (token.content in template and not token.content.isspace())
    }


def is_markup(token: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether an added token is one of a pair such as `<think>` and `</think>` and is not special.

    Such tokens are written inside of a turn: they structure what a model says and do not end it.
    """
    tag = TAG.fullmatch(token)
    ids = tokenizer.added_tokens_encoder
    if not tag or f"<{tag[1]}>" not in ids or f"</{tag[1]}>" not in ids:
        return False
    return not tokenizer.added_tokens_decoder[ids[token]].special


def plain_control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The control tokens that are not special, without markup. `encode_special_tokens` does not apply to them."""
    added = tokenizer.added_tokens_decoder
    return [
        token
        for token, token_id in control_tokens(tokenizer).items()
        if not added[token_id].special and not is_markup(token, tokenizer)
    ]


class RenamedTokenizer:
    """A copy of a tokenizer in which some added tokens have names that no text contains, so that no text becomes one.

    Args:
        tokenizer: the tokenizer to copy.
        tokens: the added tokens to rename.

    Attributes:
        names: {token: its other name}.
        backend: the copy, without truncation, padding and post-processor.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.names = {token: f"|{hashlib.sha256(token.encode()).hexdigest()}|" for token in tokens}
        for added in state["added_tokens"]:
            added["content"] = self._renamed(added["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(token): token_id for token, token_id in model["vocab"].items()}
        else:  # the pieces of a Unigram model with their scores
            model["vocab"] = [(self._renamed(token), score) for token, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._renamed(model["unk_token"])
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self.backend = Tokenizer.from_str(json.dumps(state))
        # Tokens outside of the model's vocabulary are numbered anew when a tokenizer is loaded.
        largest_id = max(*self.backend.get_vocab().values(), len(tokenizer))
        self._original_ids = np.arange(largest_id + 1, dtype=np.int32)
        for token_id, added in tokenizer.added_tokens_decoder.items():
            self._original_ids[self.backend.token_to_id(self._renamed(added.content))] = token_id

    def _renamed(self, token: str) -> str:
        return self.names.get(token, token)

    def original_ids(self, ids: np.ndarray) -> np.ndarray:
        """The tokenizer's own ids for ids of the copy."""
        return self._original_ids[ids]


_renamed_tokenizers: WeakKeyDictionary[PreTrainedTokenizerFast, RenamedTokenizer] = WeakKeyDictionary()


def rename_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> RenamedTokenizer:
    """A copy of the tokenizer that does not recognize these tokens in a text; cached for each tokenizer."""
    renamed = _renamed_tokenizers.get(tokenizer)
    if renamed is None or set(renamed.names) != set(tokens):
        renamed = RenamedTokenizer(tokenizer, tokens)
        _renamed_tokenizers[tokenizer] = renamed
    return renamed
