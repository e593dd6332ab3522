"""What Trainer costs against a plain loop: the same model, rows and steps, alternately; median of the ratios.

    OMP_WAIT_POLICY=passive python benchmarks/trainer_overhead.py

The loop does what the recipe does (packed rows, collator, token-mean loss, clipping, Muon), without Trainer,
accelerate, callbacks, logging or the schedule. Takes the tiny causal configuration.
"""

import argparse
import statistics
import tempfile
import time

from unlabeled import explained


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", default="recipes/configs/tiny/pretrain_clm.yaml")
    arguments.add_argument("--steps", type=int, default=40, help="steps in each round")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()

    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, set_seed

    from unlabeled.arguments import DataArguments, ModelArguments, PretrainingArguments
    from unlabeled.collators import PackedCollator
    from unlabeled.corpus import parse_sources
    from unlabeled.evaluation import causal_lm_loss
    from unlabeled.modeling import from_scratch, scratch_config
    from unlabeled.optim import BuildOptimizer
    from unlabeled.packing import TrainingRows
    from unlabeled.parsing import parse
    from unlabeled.prepare import load_prepared, prepare
    from unlabeled.tokenization import load_tokenizer
    from unlabeled.training import ExactTrainer

    model_args, data_args, args = parse(
        ModelArguments, DataArguments, PretrainingArguments,
        args=["--config", options.config, "--output_dir", tempfile.mkdtemp(), "--save_strategy", "no",
              "--eval_strategy", "no"],
    )  # fmt: skip
    args.max_steps, args.disable_tqdm = options.steps, True
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    sources = [
        parse_sources(data, key) for data, key in ((data_args.train_data, "train"), (data_args.eval_data, "eval"))
    ]
    rows, manifest = load_prepared(prepare(*sources, tokenizer, "clm", args.max_length, data_args.prepared_dir))
    training = TrainingRows(rows["train"], options.steps * args.rows_per_step, seed=0)
    collator = PackedCollator(tokenizer, max_length=args.max_length)

    def fresh():
        set_seed(0)
        config = scratch_config(model_args.model_type, model_args.config_overrides, tokenizer, args.max_length)
        model = from_scratch(AutoModelForCausalLM, config, model_args.attn_implementation)
        model.config.use_cache = False
        return model

    def plain_loop() -> float:
        model = fresh().train()
        optimizer = BuildOptimizer()(model, **args.optimizer_kwargs)
        started = time.perf_counter()
        for batch in DataLoader(training, batch_size=args.rows_per_step, collate_fn=collator):
            labels = batch.pop("labels")
            causal_lm_loss(model(**batch), labels, (labels != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            model.zero_grad()
        return time.perf_counter() - started

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_train_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.started

    def trainer() -> float:
        exact = ExactTrainer(
            model=fresh(), args=args, train_dataset=training, eval_dataset=rows["validation"], data_collator=collator,
            processing_class=tokenizer, compute_loss_func=causal_lm_loss, objective="clm",
            optimizer_cls_and_kwargs=(BuildOptimizer, args.optimizer_kwargs),
            splits=manifest["splits"],
            callbacks=[clock := Clock()],
        )  # fmt: skip
        exact.remove_callback(PrinterCallback)
        exact.train()
        return clock.seconds

    plain_loop(), trainer()  # warm up
    ratios, tokens = [], options.steps * args.batch_tokens
    for turn in range(options.rounds):
        first, second = (plain_loop, trainer) if turn % 2 == 0 else (trainer, plain_loop)
        seconds = {first: first()}
        seconds[second] = second()
        ratios.append(seconds[trainer] / seconds[plain_loop])
        speeds = [f"{tokens / seconds[run]:,.0f}" for run in (plain_loop, trainer)]
        print(f"loop {speeds[0]}, Trainer {speeds[1]} tokens/s, time x {ratios[-1]:.3f}")
    print(f"Trainer takes {statistics.median(ratios):.3f} times the loop's time (median of {options.rounds} rounds)")


if __name__ == "__main__":
    with explained():
        main()
