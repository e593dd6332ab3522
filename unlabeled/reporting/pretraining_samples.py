"""Samples of a pretrained model, as Markdown: continuations, filled masks, restored spans, nearest neighbours."""

import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unlabeled.data.collators import DataCollatorForSpanCorruption
from unlabeled.data.rows import EvaluationRows
from unlabeled.data.span_corruption import spans_by_sentinel

RESTORED_ROWS = 256  # held-out rows, of which the first text is restored


def first_words(tokenizer: PreTrainedTokenizerFast, rows, count: int = 3, tokens: int = 24) -> list[str]:
    """The first tokens of some packed rows, as text.

    Args:
        rows: with `input_ids`; `count` of them are taken, spread over the data.
        tokens: of each row.
    """
    indices = [len(rows) * (number + 1) // (count + 1) for number in range(count)]
    return [tokenizer.decode(row["input_ids"][:tokens], skip_special_tokens=True) for row in rows.select(indices)]


def sample_continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> str:
    """A continuation of each prompt, sampled at temperature 0.8 and top-p 0.95."""
    lines = ["Each prompt is held-out text; the continuation is sampled at temperature 0.8, top-p 0.95.", ""]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    positions = getattr(model.config, "max_position_embeddings", 1024)
    for prompt in prompts:
        ids = [first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        output = model.generate(
            torch.tensor([ids]),
            max_new_tokens=max(min(100, positions - len(ids)), 1),
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        continuation = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        lines += ["```text", f"{prompt}|{continuation}", "```", ""]
    return "\n".join(lines)


def mask_words(tokenizer: PreTrainedTokenizerFast, sentence: str, every: int = 5) -> tuple[str, list[str]]:
    """The sentence with every fifth alphabetic word masked, and the masked words.

    The name of the mask token, where a text has it, is removed: the tokenizer would read it as one more mask.
    """
    while tokenizer.mask_token in sentence:  # removing it may put such a name together
        sentence = sentence.replace(tokenizer.mask_token, " ")
    words = sentence.split()
    alphabetic = [index for index, word in enumerate(words) if word.isalpha()]
    masked = alphabetic[every // 2 :: every]
    hidden = [words[index] for index in masked]
    for index in masked:
        words[index] = tokenizer.mask_token
    return " ".join(words), hidden


def fill_sample_masks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: list[str]) -> str:
    """Each sentence with some words masked, and the five most probable tokens for each mask."""
    lines = ["Some words of held-out text are masked, each by one mask token. Guesses are the five most probable.", ""]
    for sentence in sentences:
        masked, hidden = mask_words(tokenizer, sentence)
        inputs = tokenizer(masked, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        positions = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
        lines += [f"> {masked}", "", "| hidden word | guesses |", "|---|---|"]
        for word, position in zip(hidden, positions, strict=True):
            best = logits[position].softmax(-1).topk(5)
            guesses = [
                f"{tokenizer.decode([token])} ({probability:.0%})"
                for probability, token in zip(best.values, best.indices, strict=True)
            ]
            lines.append(f"| {word} | {', '.join(guesses)} |")
        lines.append("")
    return "\n".join(lines)


def restore_spans(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, collator: DataCollatorForSpanCorruption, rows
) -> tuple[str, dict[str, float], str]:
    """Greedy restoration of the spans that the collator removes from the first text of some rows.

    Args:
        collator: of the evaluation, which removes the same spans each time.
        rows: of the validation split; `RESTORED_ROWS` of them are taken, spread over the data.

    Returns:
        Markdown with three texts; `restored_spans`, the share of spans that are restored exactly, and `restored_of`,
        their number; and one corrupted text.
    """
    held_out = EvaluationRows(rows)
    step = math.ceil(len(held_out) / RESTORED_ROWS)
    pairs = [collator.corrupt_documents(held_out[index])[0] for index in range(0, len(held_out), step)]
    displayed = [len(pairs) * quarter // 4 for quarter in (1, 2, 3)]
    is_exact: list[bool] = []
    lines: list[str] = []
    for start in range(0, len(pairs), 32):
        batch = pairs[start : start + 32]
        inputs = tokenizer.pad({"input_ids": [ids.tolist() for ids, _ in batch]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model.generate(**inputs, max_new_tokens=collator.target_length, do_sample=False, num_beams=1)
        for index, ((ids, target), output) in enumerate(zip(batch, outputs.tolist(), strict=True), start):
            end = [*output[1:], tokenizer.eos_token_id].index(tokenizer.eos_token_id) + 1
            expected = spans_by_sentinel(target[:-1], collator.sentinels)
            restored = spans_by_sentinel(output[1:end], collator.sentinels)
            is_exact += [restored.get(sentinel) == tokens for sentinel, tokens in expected.items()]
            if index in displayed:
                lines += [f"```\n{tokenizer.decode(ids[:-1])}\n```", "", "| hidden | restored |", "|---|---|"]
                for sentinel, tokens in expected.items():
                    lines.append(f"| {_cell(tokenizer, tokens)} | {_cell(tokenizer, restored.get(sentinel, []))} |")
                lines.append("")
    share = sum(is_exact) / len(is_exact)
    metrics = {"restored_spans": share, "restored_of": len(is_exact)}
    summary = f"{share:.1%} of {len(is_exact):,} spans of held-out text are restored exactly. Three texts:\n"
    return "\n".join([summary, *lines]), metrics, tokenizer.decode(pairs[displayed[0]][0][:-1])


def _cell(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens).replace("\n", "⏎")
    return f"`{text}`"
