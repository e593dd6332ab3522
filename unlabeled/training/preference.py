"""Held-out preferences for `DPOTrainer`."""

import shutil
from pathlib import Path

import torch

from unlabeled.losses import IGNORE
from unlabeled.training.trainer import ExactMixin

ROUNDING = 1e-3  # nats; the log-probability of an answer of some hundred tokens, summed in float32


class PreferenceMixin(ExactMixin):
    """`ExactMixin` for `DPOTrainer`: held-out figures are preferences instead of tokens."""

    def __init__(self, *args, optimizer_cls_and_kwargs=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._reference: dict[int, torch.Tensor] = {}  # of the held-out pairs, by the place of their batch
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs  # `Trainer` takes it, `DPOTrainer` does not pass it on

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The data as they are: `prepare_pairs` has tokenised them.

        TRL has no public way to pass ids, and what it tokenises itself lacks the beginning of answers where the chat
        template's generation prompt differs from what the template writes before an answer.
        """
        return dataset

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
                if "ref_chosen_logps" in batch:
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
