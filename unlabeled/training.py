"""What Trainer lacks for exact pretraining: evaluation in sums, whole checkpoints, counts in tokens."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from unlabeled import UserError
from unlabeled.budget import cost, peak_memory_bytes
from unlabeled.checkpoints import explained_writes, keep_newest, publish, staging_folder, write_json
from unlabeled.console import Stopwatch, summary
from unlabeled.evaluation import IGNORE, TokenSums, figures, token_sums
from unlabeled.guards import Preemption, SpikeGuard, Watchdog, count_skipped, explained_failures, usable
from unlabeled.hub import PushMixin
from unlabeled.lineage import FIGURES, loss_unit, make_lineage, write_card
from unlabeled.modeling import readable_by_all
from unlabeled.plots import plot_loss


class ExactMixin(PushMixin):
    """Exactness for `Trainer` and its subclasses, through methods that they are meant to override.

    Args:
        objective: "clm", "mlm", "span", "sft", "dpo", "classify", "tag" or "embed".
        splits: the manifest's counts of the training and the evaluation split.
        eval_collator: collator of the evaluation; the same rows always get the same masks.
    """

    def __init__(self, *args, objective: str, splits: dict, eval_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective, self.splits = objective, splits
        self.eval_collator = eval_collator or self.data_collator
        self.stopwatch = Stopwatch()
        self.preemption = Preemption(self.args.max_hours)
        for guard in (SpikeGuard(), Watchdog(), self.preemption):
            self.add_callback(guard)
        self._kept, self._left_out = (0, 0.0), 0  # since the last log: steps and the sum of their losses; others
        self._staging = False
        self._evaluated: tuple[int, dict] | None = None

    # --- Evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict:
        """Nats and targets summed over the split: the same for any batch size and number of processes."""
        if self._evaluated and self._evaluated[0] == self.state.global_step:  # the last step was evaluated in training
            return dict(self._evaluated[1])
        with self.stopwatch.paused():
            metrics = self.held_out_figures()
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._evaluated = (self.state.global_step, metrics)
        return dict(metrics)

    def held_out_figures(self) -> dict[str, float]:
        return figures(self.token_sums(), self.objective, self.splits["validation"])

    def token_sums(self, collator=None) -> TokenSums:
        if not self.accelerator._models:  # evaluation without training before it
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return token_sums(
            self.model,  # not the wrapped one: other batch shapes would make a compiled model compile again
            self.eval_dataset,
            collator or self.eval_collator,
            self.args.per_device_eval_batch_size,
            shift=self.objective in ("clm", "sft"),
            device=self.args.device,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            reduce=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
        )

    # --- Counts in tokens -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every entry of the history has its tokens (examples, pairs) and seconds; `epoch` is passes over the text."""
        if "loss" in logs:
            if self._left_out and self._kept[0]:  # the mean of the steps that were made
                logs["loss"] *= (self._kept[0] + self._left_out) / self._kept[0]
            elif self._left_out:
                logs.pop("loss")
            self._kept, self._left_out = (0, 0.0), 0
        # Trainer's own epoch is the share of the run, since the training data are the whole run in order.
        self.state.epoch = self.state.global_step * self.args.rows_per_step / self.splits["train"]["rows"]
        logs |= {unit: round(self.state.global_step * size) for unit, size in batch_sizes(self.args).items()}
        logs["train_seconds"] = round(self.stopwatch.seconds, 3)
        super().log(logs, start_time)

    # --- Training and checkpoints -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is not None:
            self._check_batches(resume_from_checkpoint)
        with explained_failures(self.args):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.preemption.check(self.args, self.state)
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm before clipping, looked at while the step can still be left out, with its loss."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None or self.is_deepspeed_enabled:  # DeepSpeed has no such moment
            return norm
        if usable(float(norm), self.args, self.state):
            self._kept = (self._kept[0] + 1, self._tr_loss.clone())
            return norm
        self.log({"skipped_steps": count_skipped(float(norm), self.args, self.state)})
        self._left_out += 1
        self._tr_loss.zero_().add_(self._kept[1])
        for parameter in model.parameters():
            parameter.grad = None  # which optimizers take for a parameter that took no part
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save in the Hugging Face layout; the exported model uses its cache, which training has to switch off."""
        self.model.config.use_cache = not _internal_call
        with nullcontext() if _internal_call else explained_writes(self.args.output_dir, "the model"):
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """DeepSpeed hands over copies, in which tied weights are no longer one tensor and would be written twice."""
        if state_dict:
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        os.remove(os.path.join(folder, "training_args.bin"))  # may hold hub_token; lineage.json tells more
        file = os.path.join(folder, "adapter_model.safetensors")
        if os.path.exists(file):
            save_file(readable_by_all(load_file(file)), f"{file}.new", metadata={"format": "pt"})
            os.replace(f"{file}.new", file)  # and not into the file, from which the tensors are mapped

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card that `finish` writes; a push would put Trainer's own over it."""

    def _check_batches(self, checkpoint: str) -> None:
        """Per-rank random states and ZeRO shards belong to a number of processes."""
        rng = [name for name in os.listdir(checkpoint) if name.startswith("rng_state")]
        if len(rng) != self.args.world_size:
            raise UserError(
                f"{checkpoint} was written by {len(rng)} processes and this run has {self.args.world_size}; "
                "resume with as many"
            )

    def _get_output_dir(self, trial) -> str:
        return staging_folder(self.args.output_dir) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write aside, then rename: a checkpoint is whole or absent, whenever the run is killed."""
        name = f"checkpoint-{self.state.global_step}"
        with self.stopwatch.paused():
            if self.args.should_save:
                shutil.rmtree(staging_folder(self.args.output_dir), ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = True
            try:
                with explained_writes(self.args.output_dir, name):
                    super()._save_checkpoint(model, trial)
                    best = f"checkpoint-{self.state.best_global_step}"
                    if self.state.best_global_step:  # Trainer has looked for it where this one is written
                        self.state.best_model_checkpoint = os.path.join(self.args.output_dir, best)
                    self.accelerator.wait_for_everyone()
                    if self.args.should_save:
                        self.state.save_to_json(os.path.join(self._get_output_dir(trial), name, TRAINER_STATE_NAME))
                        publish(self.args.output_dir, name)
                        keep_newest(self.args.output_dir, self.args.save_total_limit, best)
            finally:
                self._staging = False
                if self.args.should_save:
                    shutil.rmtree(staging_folder(self.args.output_dir), ignore_errors=True)
            self.accelerator.wait_for_everyone()
        self.push_checkpoint(os.path.join(self.args.output_dir, name))


class ExactTrainer(ExactMixin, Trainer):
    """`Trainer` with `ExactMixin`."""


ROUNDING = 1e-3  # nats; the log-probability of an answer of some hundred tokens, summed in float32


class PreferenceMixin(ExactMixin):
    """`ExactMixin` for `DPOTrainer`: held-out figures are preferences instead of tokens."""

    def __init__(self, *args, optimizer_cls_and_kwargs=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._reference: dict[int, torch.Tensor] = {}  # of the held-out pairs, by the place of their batch
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs  # `Trainer` takes it, `DPOTrainer` does not pass it on

    @torch.no_grad()
    def held_out_figures(self) -> dict[str, float]:
        """The loss and what the model prefers, over all held-out pairs; the same for any number of processes.

        - preference_accuracy: the share of pairs whose chosen answer has the higher log-probability.
        - reward_accuracy: whose chosen answer has gained more over the reference; undecided pairs count a half.
        - reward_margin: the mean of beta times that gain of the chosen over the rejected answer, in nats.

        Each as in Rafailov et al. 2023 (arXiv:2305.18290), with log-probabilities summed over the answer's tokens.
        """
        args, size = self.args, self.args.per_device_eval_batch_size
        mine = list(range(args.process_index, len(self.eval_dataset), args.world_size))
        rounds = -(-len(self.eval_dataset) // args.world_size)  # forward passes are collective under ZeRO-3
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(5, dtype=torch.float64)
        for start in range(0, rounds, size):
            places = mine[start : start + size]
            count = min(size, rounds - start)
            padded = (places + [0] * count)[:count]
            batch = self._prepare_inputs(self.data_collator([self.eval_dataset[place] for place in padded]))
            chosen, rejected = self._answers(batch)
            if start not in self._reference:  # which stays as it is
                if self.state.global_step == 0:  # and is the model itself before the first step
                    first, second = chosen, rejected
                elif "ref_chosen_logps" in batch:
                    first, second = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
                else:
                    first, second = self.compute_ref_log_probs(self.ref_model or self.model, batch)
                self._reference[start] = first.double() - second.double()
            gain = (chosen - rejected - self._reference[start])[: len(places)]
            decided = (chosen > rejected)[: len(places)].double()
            won = (gain > ROUNDING).double() + 0.5 * (gain.abs() <= ROUNDING).double()
            margin = args.beta * gain
            losses = -torch.nn.functional.logsigmoid(margin)
            parts = [losses, decided, won, margin, torch.ones_like(margin)]
            sums += torch.stack([part.sum() for part in parts]).cpu()
        self.model.train(was_training)
        loss, preferred, won, margin, pairs = self.accelerator.reduce(sums.to(args.device), reduction="sum").tolist()
        return {
            "eval_loss": loss / pairs,
            "preference_accuracy": preferred / pairs,
            "reward_accuracy": won / pairs,
            "reward_margin": margin / pairs,
            "pairs": int(pairs),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Leave TRL's frozen copy of the adapter, the reference, in checkpoints only."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            shutil.rmtree(Path(output_dir or self.args.output_dir, "ref"), ignore_errors=True)

    def _answers(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the chosen and the rejected answers: float64 (pairs,) each, in nats."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            outputs = self.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        return outputs.log_probs.double().sum(dim=1).chunk(2)


def batch_sizes(args) -> dict[str, float]:
    """What a step trains on: tokens where they were counted, and pairs or examples where the budget is in them."""
    return {unit: size for unit in dict.fromkeys(("tokens", args.unit)) if (size := getattr(args, f"batch_{unit}"))}


COMPARED = FIGURES.keys() - {"perplexity", "bits_per_byte", "unigram_entropy", "reward_margin"}


def finish(
    trainer: ExactMixin,
    plan: dict,
    manifest: dict,
    metrics: dict,
    configuration: dict,
    parent: dict | None,
    samples: str,
    example: str | list | dict,
) -> None:
    """Write what a finished run leaves beside the model; metrics.json comes last and says that it is finished."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    seconds, history = trainer.stopwatch.seconds, trainer.state.log_history
    if args.eval_on_start:  # fine-tuning: what the model could do before
        before = next(entry for entry in history if "eval_loss" in entry)
        metrics = metrics | {f"{key}_before": before[key] for key in sorted(COMPARED & before.keys())}
    done = {kind: round(trainer.state.global_step * size) for kind, size in batch_sizes(args).items()}
    metrics = {
        **metrics,
        **{f"train_{unit}": amount for unit, amount in done.items()},
        "train_seconds": round(seconds, 3),
        **{f"{unit}_per_second": round(amount / max(seconds, 1e-9), 1) for unit, amount in done.items()},
        "steps": trainer.state.global_step,
        "skipped_steps": sum("skipped_steps" in entry for entry in history),
        "parameters": plan["parameters"],
        "flops": plan["flops"] * trainer.state.global_step / args.max_steps,  # it may have stopped early
        "expected_flops": plan["flops"],
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "expected_memory_bytes": sum(plan["memory_estimate"].values()) + plan["memory_before"],
    }
    metrics["flops_per_second"] = metrics["flops"] / max(seconds, 1e-9)  # of all processes
    if plan["peak_flops"]:
        metrics["mfu"] = metrics["flops_per_second"] / (plan["peak_flops"] * args.world_size)
    references, unit = {"unigram_entropy": "unigram entropy", "eval_loss_before": "before"}, next(iter(done))
    with explained_writes(str(folder), "the results"):
        plot_loss(
            history,
            folder / "loss.png",
            f"{folder.resolve().name}: {plan['parameters'] / 1e6:.1f} M parameters",
            unit=loss_unit(trainer.objective, metrics),
            references={name: metrics[key] for key, name in references.items() if key in metrics},
            over=unit,
        )
        (folder / "samples.md").write_text(samples, encoding="utf-8")
        write_json(folder / "history.json", history)
        lineage = make_lineage(configuration, manifest, plan, metrics, parent)
        write_json(folder / "lineage.json", lineage)
        write_card(str(folder), lineage, example)
        write_json(folder / "metrics.json", metrics)
    print(
        f"\n{summary(trainer.objective, metrics)}\n{', '.join(f'{amount:,} {unit}' for unit, amount in done.items())}, "
        f"{metrics[f'{unit}_per_second']:,.0f} {unit} per second\n{cost(metrics)}\neverything is in {folder}"
    )
