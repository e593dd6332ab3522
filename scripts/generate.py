"""Try the model of any stage's folder: it continues a text, answers, or fills what was left out.

    python scripts/generate.py outputs/tiny/pretrain_clm "To be, or not" --sample
    python scripts/generate.py outputs/tiny/sft "Who speaks here?" "And to whom?" --chat
    python scripts/generate.py outputs/tiny/pretrain_mlm "The king is _ to the castle."
    python scripts/generate.py outputs/tiny/pretrain_span "The king is _ and the queen _."

A model with a chat template answers, one without continues. Of a masked model each `_`, or mask token, is filled with a
token; of one trained on spans each `_`, or sentinel, with any number of them, as is one `_` of a causal model that was
trained with `fim_rate`.
Without a PROMPT it asks for one again and again (Ctrl-D ends); a chat then remembers what was said.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator

from unlabeled import UserError, exit_on_user_error

GUESSES = 5
BLANK = r"(?<![^\W_])_+(?![^\W_])"  # not in snake_case


def load_folder(folder: str, device: str | None = None):
    """The model of a folder, with its adapter where it is one, and the tokenizer: (model, tokenizer, masked or not).

    Of an encoder-decoder `model.config.is_encoder_decoder` tells.

    Args:
        device: a GPU when there is one, unless it is named.

    Raises:
        UserError: no such folder, no language model in it, or one that does not load.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.utils.logging import disable_progress_bar

    from unlabeled.data.tokenization import load_tokenizer, vocabulary_size
    from unlabeled.models.loading import adapter_base, reload
    from unlabeled.models.safe_loading import check_foreign_code

    remedy = "name the output_dir of a finished run"
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; {remedy}")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} holds no model; {remedy}")
    disable_progress_bar()  # loading takes less time than it takes to read of it
    try:
        base = adapter_base(folder)
        check_foreign_code(base or folder, base or folder)
        config = AutoConfig.from_pretrained(base or folder, trust_remote_code=False)
        kind = (config.architectures or ["model of no known kind"])[0]
        masked = kind.endswith("ForMaskedLM")
        if config.is_encoder_decoder and kind.endswith("ForConditionalGeneration"):
            model = reload(AutoModelForSeq2SeqLM, folder)
        elif masked or kind.endswith(("ForCausalLM", "LMHeadModel")):
            model = reload(AutoModelForMaskedLM if masked else AutoModelForCausalLM, folder)
        else:
            raise UserError(
                f"{folder} holds a {kind}, neither a causal nor a masked language model, nor an encoder-decoder; "
                f"{remedy}"
            )
    except UserError:
        raise
    except Exception as error:  # a dozen kinds: torn weights, a base model that is gone
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")[:300]
        raise UserError(f"{folder} does not load ({reason}); train or export it again") from error
    tokenizer = load_tokenizer(folder)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has ids up to {vocabulary_size(tokenizer) - 1:,}, its model a table of "
            f"{model.config.vocab_size:,}; put that one "
            "there with which it was trained"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer, masked


def fill(model, tokenizer, prompt: str) -> str:
    """The prompt with the likeliest token for each mask, then the likeliest five of each with their probabilities.

    Raises:
        UserError: there is no mask, or the prompt is longer than the model's positions.
    """
    import torch

    from unlabeled.models.loading import check_positions

    text = re.sub(BLANK, tokenizer.mask_token, prompt)
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    if not places:
        raise UserError(f"there is nothing to fill in {prompt!r}; put _ or {tokenizer.mask_token} where a token lacks")
    check_positions(model.config, inputs["input_ids"].shape[1])
    with torch.no_grad():
        best = model(**inputs).logits[0, places].softmax(-1).topk(GUESSES)
    inputs["input_ids"][0, places] = best.indices[:, 0]
    lines = [tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)]
    for share, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        lines.append("  " + ", ".join(f"{tokenizer.decode([i])} {p:.0%}" for p, i in zip(share, ids, strict=True)))
    return "\n".join(lines)


def fill_spans(model, tokenizer, prompt: str, **how) -> str:
    """The prompt with what an encoder-decoder restores for each `_`, or sentinel; one that it says nothing of stays.

    `how` is for `new_tokens`.

    Raises:
        UserError: nothing is left out, or more than the tokenizer has sentinels for.
    """
    from unlabeled.data.collators import sentinel_ids, spans_of

    sentinels = sentinel_ids(tokenizer)
    # A token has its space in front, so what is left out has one too. Names: mT5's begin with a space.
    names = (token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(sentinels))
    text, blanks = re.subn(rf" ?(?:{BLANK}|<extra_id_\d+>)", lambda _: next(names, ""), prompt)
    if not 0 < blanks <= len(sentinels):
        raise UserError(f"{prompt!r} leaves out {blanks} spans; put _ where words lack, 1 to {len(sentinels)} times")
    ids = tokenizer(text)["input_ids"]
    spans = spans_of(new_tokens(model, tokenizer, ids, **how), sentinels)
    filled = [token for place in ids for token in spans.get(place, [place]) if token != tokenizer.eos_token_id]
    return tokenizer.decode(filled)


def fill_middle(model, tokenizer, prompt: str, **how) -> str:
    """The prompt with what a causal model trained with `fim_rate` puts in the place of its one `_`."""
    from unlabeled.data.fim import FIM_TOKENS
    from unlabeled.data.tokenization import encode_batch, framing

    parts = re.split(BLANK, prompt)
    before, after = (part.tolist() for part in encode_batch(tokenizer, parts))
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))
    ids = [framing(tokenizer, "clm").prefix_id, prefix, *before, suffix, *after, middle]
    return tokenizer.decode(new_tokens(model, tokenizer, ids, **how), skip_special_tokens=True).join(parts)


def new_tokens(model, tokenizer, ids: list[int], max_new_tokens: int = 100, sample: bool = False, seed: int = 0):
    """What a model generates from `ids`, without its end: list of int.

    Raises:
        UserError: `ids` are longer than the model's positions.
    """
    import torch

    from unlabeled.models.loading import check_positions

    check_positions(model.config, len(ids) + (not model.config.is_encoder_decoder))
    if not model.config.is_encoder_decoder and (positions := getattr(model.config, "max_position_embeddings", None)):
        max_new_tokens = min(max_new_tokens, positions - len(ids))
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sample else {"do_sample": False}
    torch.manual_seed(seed)
    start = torch.tensor([ids], device=model.device)
    output = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, **how,
    )[0].tolist()  # fmt: skip
    new = output[1:] if model.config.is_encoder_decoder else output[len(ids) :]
    return new[: [*new, tokenizer.eos_token_id].index(tokenizer.eos_token_id)]


def ask() -> Iterator[str]:
    """What is typed, or the lines of a pipe."""
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401  # the line can then be edited, and earlier ones come back
    try:
        while True:
            yield input("> " if asked else "")
    except (EOFError, KeyboardInterrupt):
        print(end="\n" * asked)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a finished run, a whole model or an adapter")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text; without any it is asked for")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="at most so many tokens (default: 100)")
    parser.add_argument("--sample", action="store_true", help="draw tokens (temperature 0.8, top-p 0.95), not greedy")
    parser.add_argument(
        "--seed", type=int, default=0, help="of --sample; the same seed gives the same text (default: 0)"
    )
    parser.add_argument("--chat", action="store_true", help="the PROMPTs are the turns of one conversation")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {args.max_new_tokens}; set it to 1 or more")

    from unlabeled.data.fim import FIM_TOKENS
    from unlabeled.reporting.replies import reply

    model, tokenizer, masked = load_folder(args.folder)
    restores = model.config.is_encoder_decoder
    if args.chat and (masked or restores or not tokenizer.chat_template):
        raise UserError(f"{args.folder} has no chat template, so it holds no conversation; leave out --chat")
    model.config.use_cache = True
    chat = args.chat or (not args.prompts and not masked and not restores and bool(tokenizer.chat_template))
    infills = not tokenizer.chat_template and set(FIM_TOKENS) <= set(tokenizer.get_vocab())
    how = {"max_new_tokens": args.max_new_tokens, "sample": args.sample, "seed": args.seed}
    conversation, answered = [], 0
    for answered, prompt in enumerate(args.prompts or ask(), 1):  # noqa: B007
        if masked:
            print(fill(model, tokenizer, prompt), flush=True)
            continue
        if restores or (infills and len(re.findall(BLANK, prompt)) == 1):
            print((fill_spans if restores else fill_middle)(model, tokenizer, prompt, **how), flush=True)
            continue
        said = [*conversation, {"role": "user", "content": prompt}] if chat else prompt
        answer = reply(model, tokenizer, said, **how)
        conversation = [*said, {"role": "assistant", "content": answer}] if chat else []
        print(answer if tokenizer.chat_template else prompt + answer, flush=True)
    if not answered and not sys.stdin.isatty():
        raise UserError("there is no PROMPT; give one behind the folder, or lines on standard input")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
