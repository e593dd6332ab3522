"""Generate text with the model of any stage: it continues a text, answers, or fills in what is missing.

    python scripts/generate.py outputs/tiny/pretrain_clm "To be, or not" --sample
    python scripts/generate.py outputs/tiny/sft "Who speaks here?" "And to whom?" --chat
    python scripts/generate.py outputs/tiny/pretrain_mlm "The king is _ to the castle."
    python scripts/generate.py outputs/tiny/pretrain_span "The king is _ and the queen _."

A model with a chat template answers, one without continues. A masked model fills each `_`, or mask token, with one
token. A model trained on spans fills each `_`, or sentinel, with any number of tokens, and so does a causal model
trained with `fim_rate` with a single `_`.
Without a PROMPT it asks for prompts until Ctrl-D; a chat then remembers the conversation.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from unlabeled import UserError, exit_on_user_error


def read_prompts() -> Iterator[str]:
    """Prompts that are typed in, or the lines of a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # lines can then be edited, and earlier ones come back
    try:
        while True:
            yield input("> " if interactive else "")
    except (EOFError, KeyboardInterrupt):
        if interactive:
            print()


def print_outputs(folder: str, prompts: list[str], chat: bool, options: dict[str, Any]) -> None:
    """Print the model's output for each prompt.

    Args:
        folder: output_dir of a finished run.
        prompts: without any they are read from standard input.
        chat: the prompts are the turns of one conversation.
        options: arguments of `generate_tokens` and `reply`.
    """
    from unlabeled.data.fim import FIM_TOKENS
    from unlabeled.models.generation import BLANK, fill_masks, fill_middle, fill_spans, load_for_generation, reply

    model, tokenizer, is_masked = load_for_generation(folder)
    model.config.use_cache = True
    is_span_model = model.config.is_encoder_decoder
    has_template = bool(tokenizer.chat_template)
    if chat and (is_masked or is_span_model or not has_template):
        raise UserError(f"{folder} has no chat template, so it holds no conversation; leave out --chat")
    if not prompts and has_template and not is_masked and not is_span_model:
        chat = True
    fills_middle = not has_template and set(FIM_TOKENS) <= set(tokenizer.get_vocab())
    conversation: list[dict] = []
    has_prompts = False
    for prompt in prompts or read_prompts():
        has_prompts = True
        if is_masked:
            output = fill_masks(model, tokenizer, prompt)
        elif is_span_model:
            output = fill_spans(model, tokenizer, prompt, **options)
        elif fills_middle and len(BLANK.findall(prompt)) == 1:
            output = fill_middle(model, tokenizer, prompt, **options)
        elif chat:
            conversation.append({"role": "user", "content": prompt})
            output = reply(model, tokenizer, conversation, **options)
            conversation.append({"role": "assistant", "content": output})
        else:
            output = reply(model, tokenizer, prompt, **options)
            if not has_template:
                output = prompt + output
        print(output, flush=True)
    if not has_prompts and not sys.stdin.isatty():
        raise UserError("there is no PROMPT; give one after the folder, or lines on standard input")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a finished run, a whole model or an adapter")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text; without any it is asked for")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="at most this many tokens (default: 100)")
    parser.add_argument("--sample", action="store_true", help="sample (temperature 0.8, top-p 0.95), not greedy")
    parser.add_argument("--seed", type=int, default=0, help="for --sample; a seed gives the same text (default: 0)")
    parser.add_argument("--chat", action="store_true", help="the PROMPTs are the turns of one conversation")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {args.max_new_tokens}; set it to 1 or more")
    options = {"max_new_tokens": args.max_new_tokens, "sample": args.sample, "seed": args.seed}
    print_outputs(args.folder, args.prompts, args.chat, options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
