"""The output of each model of a chain for the prompts of the chain, kept in a file so that it is generated once."""

import hashlib
import json
import re
import sys
from pathlib import Path

from unlabeled.reporting.chain_stages import ReportStage, read_file
from unlabeled.runtime.files import write_json

MAX_NEW_TOKENS = 60


def add_samples(stages: list[ReportStage], prompts: list[str], cache: Path) -> None:
    """Give each stage that has a model its output for the prompts. Only what is not in the cache is generated.

    Args:
        cache: a JSON file; written again if anything in it has changed.
    """
    cached = read_file(cache, dict)
    samples: dict[str, list[str]] = {}
    for stage in stages:
        if not stage.weights or not prompts:
            continue
        key = sample_key(stage, prompts)
        texts = cached.get(key)
        if not isinstance(texts, list) or len(texts) != len(prompts):
            print(f"samples of {stage.name}", file=sys.stderr)
            try:
                texts = generate_samples(stage.folder, prompts)
            except Exception as error:  # damaged weights, or a base model that is gone
                reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
                print(f"no samples of {stage.name}: {stage.folder} does not answer ({reason})", file=sys.stderr)
                continue
        stage.samples = [str(text) for text in texts]
        samples[key] = stage.samples
    if samples and samples != cached:
        write_json(cache, samples)


def sample_key(stage: ReportStage, prompts: list[str]) -> str:
    """The sha256 of what the samples depend on: weights, chat template, prompts and length."""
    template = stage.folder / "chat_template.jinja"
    chat_template = template.read_text(encoding="utf-8") if template.exists() else None
    return hashlib.sha256(json.dumps([stage.weights, chat_template, prompts, MAX_NEW_TOKENS]).encode()).hexdigest()


def generate_samples(folder: Path, prompts: list[str]) -> list[str]:
    """The output of the model of a folder for each prompt: a reply, a continuation, or the prompt with blanks filled.

    Masked models and models trained on spans fill in the masks of the prompts, or one at the end.
    """
    from unlabeled.models.generation import fill_masks, fill_spans, load_for_generation, reply

    model, tokenizer, is_masked = load_for_generation(str(folder))
    if not is_masked and not model.config.is_encoder_decoder:
        return [reply(model, tokenizer, prompt, max_new_tokens=MAX_NEW_TOKENS) for prompt in prompts]
    blank = tokenizer.mask_token if is_masked else "_"
    samples = []
    for prompt in prompts:
        text = re.sub(r"\[MASK\]|<mask>", blank, prompt)
        if blank not in text:
            text = f"{text} {blank}"
        if is_masked:
            samples.append(fill_masks(model, tokenizer, text).split("\n")[0])
        else:
            samples.append(fill_spans(model, tokenizer, text, max_new_tokens=MAX_NEW_TOKENS))
    return samples
