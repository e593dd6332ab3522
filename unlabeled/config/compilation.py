"""Whether `compile: auto` compiles the model."""

from transformers import TrainingArguments

# Compiling takes 20 to 40 s on a CPU and then saves 5 % of the time in fp32, where nearly all of it goes into matrix
# products (benchmarks/results): it pays in runs of at least this many FLOPs. In bf16, not measured yet, more is saved.
CPU_COMPILE_FLOPS = {"fp32": 5e13, "bf16": 2e13}


def resolve_compile(args: TrainingArguments, flops: float) -> None:
    """Set `torch_compile`, `torch_compile_backend` and `torch_compile_mode` according to the key `compile`.

    With `compile: auto` a model is compiled on a GPU, and on a CPU in runs that are long enough to gain from it.

    Args:
        args: the arguments of the run, changed in place.
        flops: of the whole run.
    """
    if args.compile != "auto":
        args.torch_compile = args.compile == "true"
    elif args.use_cpu:
        args.torch_compile = flops >= CPU_COMPILE_FLOPS["bf16" if args.bf16 else "fp32"]
    else:
        args.torch_compile = args.device.type == "cuda"

    if not args.torch_compile:  # a backend or a mode alone would make Trainer compile
        args.torch_compile_backend = None
        args.torch_compile_mode = None
    elif args.torch_compile_backend is None:
        args.torch_compile_backend = "inductor"
