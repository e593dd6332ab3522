"""A step of the optimizer."""

from functools import partial

import torch
from torch import nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import hugging_face_model
from unlabeled.models.optimizers import OptimizerFactory, orthogonalize


def optimizer(bench: Bench) -> None:
    """Measure a step of each optimizer for the 124M model, gradient clipping, and the iteration of Muon."""
    model = hugging_face_model("gpt2", bench.shape).to(bench.device)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    rates = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    factories = {
        "AdamW, fused (as the recipes)": lambda: OptimizerFactory()(model, optimizer="adamw", **rates),
        "AdamW, foreach": lambda: torch.optim.AdamW(parameters, foreach=True, **rates),
        "Muon with AdamW (as the recipes)": lambda: OptimizerFactory()(model, optimizer="muon", **rates),
    }
    for name, build in factories.items():
        with bench.attempt(name):
            step = build().step
            bench.record(name, ms=bench.milliseconds(step), extra_gb=bench.extra_gigabytes(step))
            del step
    with bench.attempt("clipping"):
        call = partial(nn.utils.clip_grad_norm_, parameters, 1.0)
        bench.record("clip_grad_norm_, foreach", ms=bench.milliseconds(call))
    width = bench.shape.width
    matrices = torch.randn(bench.shape.layers, width, 4 * width, device=bench.device)
    for name, call in {"eager": orthogonalize, "compiled": bench.compiled(orthogonalize, dynamic=False)}.items():
        with bench.attempt(f"orthogonalize, {name}"):
            ms = bench.milliseconds(partial(call, matrices))
            size = f"{bench.shape.layers} x {width} x {4 * width}"
            bench.record(f"orthogonalize, {size}, {name}", ms=ms)
