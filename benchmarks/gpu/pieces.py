"""The pieces of the GPU benchmark, the most important ones first."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.gpu.attention import attention, flexible_attention, relative_positions
from benchmarks.gpu.head import head
from benchmarks.gpu.loop import loop, recompilations
from benchmarks.gpu.machine import machine
from benchmarks.gpu.optimizer import optimizer
from benchmarks.gpu.recipes import recipe, stock
from benchmarks.gpu.resume import resume


@dataclass(frozen=True)
class Piece:
    """A measurement, which runs in a process of its own."""

    section: str
    name: str
    measure: Callable  # called with the `Bench`
    seconds: float = 60.0  # time limit
    needs: tuple[str, ...] = ()  # modules


def make_pieces(folder: Path, small: bool) -> list[Piece]:
    """All pieces.

    Args:
        folder: for text and runs.
        small: sizes for a test.
    """

    def loop_piece(name: str, seconds: float = 75, **options) -> Piece:
        return Piece("loop", name, partial(loop, **options), seconds)

    def compilation_piece(kind: str, lengths: str) -> Piece:
        return Piece("compilations", f"{kind} {lengths}", partial(recompilations, kind=kind, lengths=lengths), 60)

    def recipe_piece(name: str, seconds: float = 90, **options) -> Piece:
        label = " ".join([name, *options.values()])
        needs = ("trl",) if "smollm2" in name else ()
        measure = partial(recipe, name=name, folder=folder, small=small, **options)
        return Piece("recipe", label, measure, seconds, needs)

    def stock_piece(name: str, seconds: float = 75) -> Piece:
        return Piece("stock", f"stock {name}", partial(stock, name=name, folder=folder, small=small), seconds)

    varlen_head = {"attn": "varlen", "head": "compiled chunks"}
    return [
        Piece("machine", "machine", machine, 30),
        Piece("head", "head", head, 60),
        Piece("attention", "attention", attention, 40),
        loop_piece("plain GPT", kind="plain"),
        loop_piece("as in the recipes", kind="gpt2"),
        loop_piece("varlen, compiled head", kind="gpt2", **varlen_head, lengths="dynamic"),
        *[
            compilation_piece(kind, lengths)
            for kind, lengths in product(("gpt2", "modernbert"), ("unchanged", "padded", "dynamic"))
        ],
        recipe_piece("gpt2-124m"),
        recipe_piece("gpt2-124m", 120, attn_implementation="varlen"),
        recipe_piece("modernbert-base"),
        recipe_piece("modernbert-base", 150, attn_implementation="varlen"),
        recipe_piece("t5-base", 150),
        stock_piece("gpt2-124m"),
        loop_piece("ModernBERT", kind="modernbert", **varlen_head, lengths="dynamic"),
        loop_piece("compiled head", kind="gpt2", head="compiled chunks"),
        loop_piece("varlen padded", kind="gpt2", attn="varlen", lengths="padded"),
        loop_piece("varlen padded, compiled head", kind="gpt2", **varlen_head, lengths="padded"),
        recipe_piece("smollm2-135m-sft"),
        recipe_piece("smollm2-135m-dpo"),
        Piece("attention", "relative positions", relative_positions, 60),
        loop_piece("varlen, head in graph", kind="gpt2", attn="varlen", head="in graph", lengths="dynamic"),
        stock_piece("modernbert-base"),
        Piece("resume", "resume", partial(resume, folder=folder, small=small), 120),
        Piece("optimizer", "optimizer", optimizer, 30),
        Piece("attention", "flex_attention", flexible_attention, 75),
        stock_piece("t5-base", 90),
    ]
