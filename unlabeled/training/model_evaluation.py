"""Loss, perplexity and bits per byte of a finished model on raw text, as the pretraining recipes evaluate it."""

import tempfile
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlabeled.data.collators import DataCollatorForPackedLanguageModeling, DataCollatorForSpanCorruption
from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.randomness import EVALUATION_SEED
from unlabeled.data.sources import parse_sources
from unlabeled.data.span_corruption import add_span_tokens
from unlabeled.data.summary import describe_dataset
from unlabeled.data.tokenization import ensure_pad_token
from unlabeled.errors import UserError
from unlabeled.models.attention import check_isolation, separate_cross_attention_mask, sliding_window
from unlabeled.models.configs import check_positions
from unlabeled.models.generation import load_for_generation
from unlabeled.planning.spans import Denoiser
from unlabeled.training.evaluation import token_metrics, token_sums
from unlabeled.training.lm_eval_tasks import run_tasks

MLM_PROBABILITY = 0.15  # of all metrics that compare masked models
LARGEST_BATCH = 64  # rows
LOGITS_IN_BATCH = 1 << 27  # 512 MB of float32
LONGEST_ROW = 1024  # tokens, if `max_length` is not given
LONGEST_ENCODER_ROW = 512


def evaluate_folder(
    folder: str,
    data: list[str],
    text_column: str = "text",
    max_length: int | None = None,
    tasks: list[dict[str, Any]] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluate the model, or the adapter with its base, of a finished run.

    Args:
        folder: The `output_dir` of the run.
        data: Files, folders, globs or data sets with held-out text.
        text_column: The column that holds the text.
        max_length: Tokens in a row, by default the model's positions, at most 1,024, or 512 for an encoder-decoder.
        tasks: Tasks of lm-eval (see `lm_eval_tasks`), for causal models.

    Returns:
        The metrics of the text and the scores of the tasks.

    Raises:
        UserError: The model, the text or a task cannot be used.
    """
    model, tokenizer, is_masked = load_for_generation(folder)
    max_length = max_length or _default_length(model)
    check_positions(model.config, max_length)
    if tasks and (is_masked or model.config.is_encoder_decoder):
        raise UserError(f"--tasks: lm-eval asks causal models, and {folder} holds another; leave --tasks out")
    scores = run_tasks(model, tokenizer, tasks, max_length) if tasks else {}
    return evaluate_text(model, tokenizer, is_masked, data, text_column, max_length), scores


def evaluate_text(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    is_masked: bool,
    data: list[str],
    text_column: str,
    max_length: int,
) -> dict[str, float]:
    """Evaluate a model on raw text, and print a summary of the text.

    The loss of a masked model is that at 15 % masked tokens, that of an encoder-decoder is that of T5's spans (15 %,
    3 tokens long on average); the masks and spans are the same in every evaluation.

    Args:
        model: A causal, masked or span-corruption model; its configuration may be changed.
        tokenizer: Its tokenizer, which may be changed.
        is_masked: Whether it is a masked model.
        data: Files, folders, globs or data sets.
        text_column: The column that holds the text.
        max_length: Tokens in a row.

    Returns:
        The metrics of `training.evaluation`, the counts of the text, and `max_length`.
    """
    objective = "clm"
    if model.config.is_encoder_decoder:
        objective = "span"
    elif is_masked:
        objective = "mlm"
    denoisers = (Denoiser(),) if objective == "span" else ()
    _restore_pretraining_eos(model, tokenizer)
    ensure_pad_token(tokenizer)
    if denoisers:
        add_span_tokens(tokenizer, denoisers, max_length)  # raises if there are too few sentinels
    sources = parse_sources(data, "--data", text_column)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as cache:
        # `prepare` needs a training split as well, for which the same text serves.
        folder = prepare(sources, sources, tokenizer, objective, max_length, cache, denoisers=denoisers)
        rows, manifest = load_prepared(folder)
        split = manifest["splits"]["validation"]
        print(describe_dataset(manifest | {"splits": {"text": split}, "sources": []}))
        # Padding is never attended to, and a larger vocabulary would change the loss.
        if tokenizer.pad_token_id >= model.config.vocab_size:
            tokenizer.pad_token = tokenizer.eos_token
        collator = _make_collator(model, tokenizer, objective, max_length)
        if objective == "span":
            model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)
        model.config.use_cache = False  # a cache would switch off the isolation by position_ids
        check_isolation(model, collator)
        batch_size = LOGITS_IN_BATCH // (max_length * model.config.vocab_size)
        batch_size = max(1, min(LARGEST_BATCH, batch_size))
        shift = objective == "clm"
        sums = token_sums(model, rows["validation"], collator, batch_size, shift=shift, device=model.device)
    metrics = token_metrics(sums, objective, split)
    counts = {key: split[key] for key in ("documents", "bytes", "text_tokens")}
    return metrics | counts | {"max_length": max_length}


def format_evaluation(metrics: dict[str, float], scores: dict[str, float]) -> str:
    """The metrics of `evaluate_folder` as lines of text."""
    line = f"loss {metrics['eval_loss']:.4f} nats per target token, perplexity {metrics['perplexity']:.2f}"
    if "bits_per_byte" in metrics:
        line += f", {metrics['bits_per_byte']:.4f} bits per byte"
    lines = [f"{line}; {metrics['targets']:,} targets"]
    lines += [f"{name} {score:.4f}" for name, score in scores.items()]
    return "\n".join(lines)


def _default_length(model: PreTrainedModel | PeftModel) -> int:
    longest = LONGEST_ENCODER_ROW if model.config.is_encoder_decoder else LONGEST_ROW
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(longest, positions) if positions else longest


def _restore_pretraining_eos(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let documents end as in pretraining, rather than with the end of a turn that a chat template has set as eos."""
    eos_token_ids = model.generation_config.eos_token_id if model.can_generate() else None
    if not tokenizer.chat_template or not isinstance(eos_token_ids, list):
        return
    pretraining_ids = [token_id for token_id in eos_token_ids if token_id != tokenizer.eos_token_id]
    if pretraining_ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(pretraining_ids[0])


def _make_collator(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int
) -> DataCollatorForPackedLanguageModeling:
    if objective == "mlm":
        return DataCollatorForPackedLanguageModeling(
            tokenizer,
            mlm=True,
            mlm_probability=MLM_PROBABILITY,
            max_length=max_length,
            seed=EVALUATION_SEED,
            sliding_window=sliding_window(model.config),
        )
    if objective == "span":
        return DataCollatorForSpanCorruption(
            tokenizer,
            max_length=max_length,
            seed=EVALUATION_SEED,
            decoder_start_token_id=model.config.decoder_start_token_id,
        )
    return DataCollatorForPackedLanguageModeling(tokenizer, mlm=False, max_length=max_length)
