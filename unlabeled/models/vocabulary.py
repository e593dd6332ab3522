"""A loaded model made to hold every token of its tokenizer."""

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from unlabeled.data.tokenization import vocabulary_size
from unlabeled.models.configs import check_positions


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    """Grow the embeddings of a loaded model to the tokenizer's vocabulary, and check its positions.

    New rows of the embedding and the output head are the mean of the old rows, so they depend on no random state.

    Args:
        model: is changed in place; embeddings that are large enough already are left alone.
        tokenizer: the tokenizer that the model is trained with.
        max_length: tokens in a row.

    Returns:
        True if the embeddings had to grow.

    Raises:
        UserError: `max_length` is longer than the model's positions.
    """
    check_positions(model.config, max_length)
    old_size = model.config.vocab_size
    new_size = vocabulary_size(tokenizer)
    if new_size <= old_size:
        return False
    model.resize_token_embeddings(new_size, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(table.weight): table.weight for table in tables if table is not None}  # one entry if they are tied
    for weight in weights.values():
        with torch.no_grad(), gathered(weight):
            weight[old_size:] = weight[:old_size].mean(dim=0)
    return True


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """Inside this context a parameter that ZeRO-3 shards is whole; the first process's values are kept at its end."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
