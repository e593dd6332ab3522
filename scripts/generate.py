"""Try the model of any stage's folder: it continues a text, answers, or fills masks.

    python scripts/generate.py outputs/tiny/pretrain_clm "To be, or not" --sample
    python scripts/generate.py outputs/tiny/sft "Who speaks here?" "And to whom?" --chat
    python scripts/generate.py outputs/tiny/pretrain_mlm "The king is _ to the castle."

A model with a chat template answers, one without continues. Of a masked model each `_`, or mask token, is filled.
Without a PROMPT it asks for one again and again (Ctrl-D ends); a chat then remembers what was said.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator

from unlabeled import UserError, explained

GUESSES = 5


def load_folder(folder: str, device: str | None = None):
    """The model of a folder, with its adapter where it is one, and the tokenizer: (model, tokenizer, masked or not).

    Args:
        device: a GPU when there is one, unless it is named.

    Raises:
        UserError: no such folder, no language model in it, or one that does not load.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    from unlabeled.modeling import adapter_base, reload
    from unlabeled.tokenization import load_tokenizer

    remedy = "name the output_dir of a finished run"
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; {remedy}")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} holds no model; {remedy}")
    disable_progress_bar()  # loading takes less time than it takes to read of it
    try:
        kind = (AutoConfig.from_pretrained(adapter_base(folder) or folder).architectures or ["model of no known kind"])[
            0
        ]
        masked = kind.endswith("ForMaskedLM")
        if masked or kind.endswith(("ForCausalLM", "LMHeadModel")):
            model = reload(AutoModelForMaskedLM if masked else AutoModelForCausalLM, folder)
        else:
            raise UserError(f"{folder} holds a {kind}, neither a causal nor a masked language model; {remedy}")
    except UserError:
        raise
    except Exception as error:  # a dozen kinds: torn weights, a base model that is gone
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")[:300]
        raise UserError(f"{folder} does not load ({reason}); train or export it again") from error
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, its model {model.config.vocab_size}; put that one "
            "there with which it was trained"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer, masked


def fill(model, tokenizer, prompt: str) -> str:
    """The prompt with the likeliest token for each mask, then the likeliest five of each with their probabilities.

    Raises:
        UserError: there is no mask, or the prompt is longer than the model's positions.
    """
    import torch

    from unlabeled.modeling import check_positions

    text = re.sub(r"(?<![^\W_])_+(?![^\W_])", tokenizer.mask_token, prompt)  # not in snake_case
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

    from unlabeled.chat import reply

    model, tokenizer, masked = load_folder(args.folder)
    if args.chat and (masked or not tokenizer.chat_template):
        raise UserError(f"{args.folder} has no chat template, so it holds no conversation; leave out --chat")
    model.config.use_cache = True
    chat = args.chat or (not args.prompts and not masked and bool(tokenizer.chat_template))
    conversation, answered = [], 0
    for answered, prompt in enumerate(args.prompts or ask(), 1):  # noqa: B007
        if masked:
            print(fill(model, tokenizer, prompt), flush=True)
            continue
        said = [*conversation, {"role": "user", "content": prompt}] if chat else prompt
        answer = reply(model, tokenizer, said, args.max_new_tokens, args.sample, args.seed)
        conversation = [*said, {"role": "assistant", "content": answer}] if chat else []
        print(answer if tokenizer.chat_template else prompt + answer, flush=True)
    if not answered and not sys.stdin.isatty():
        raise UserError("there is no PROMPT; give one behind the folder, or lines on standard input")


if __name__ == "__main__":
    with explained():
        main()
