"""`DPOTrainer` with exact evaluation and resume."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from trl import DPOTrainer

from unlabeled import compat
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.errors import UserError
from unlabeled.training.trainer import ExactTrainerMixin

ROUNDING = 1e-3  # nats; the log-probability of an answer of some hundred tokens, summed in float32


class ExactDPOTrainer(ExactTrainerMixin, DPOTrainer):
    """TRL's `DPOTrainer` with exact evaluation and resume; it evaluates preferences instead of tokens."""

    def __init__(self, *, optimizer_cls_and_kwargs=None, **kwargs):
        self._planned_optimizer = optimizer_cls_and_kwargs
        super().__init__(**kwargs)
        # Log-probabilities of the chosen and the rejected answers of the validation pairs, by the index of their batch.
        self._reference: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # `Trainer` takes this argument, and `DPOTrainer` does not pass it on.
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs

    def make_plan(self, model, args, data_collator, kwargs: dict) -> dict:
        kwargs = kwargs | {"optimizer_cls_and_kwargs": self._planned_optimizer}
        return super().make_plan(model, args, data_collator, kwargs)

    def describe_isolation(self, model, data_collator) -> str:
        return "one answer in a row"

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The data as they are: `prepare_pairs` has tokenised them.

        TRL has no public way to pass ids, and what it tokenises itself lacks the beginning of answers where the chat
        template's generation prompt differs from what the template writes before an answer.
        """
        return dataset

    def check_dataset(self, dataset) -> None:
        columns = set(getattr(dataset, "column_names", None) or ())
        if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:
            raise UserError("evaluate: the data set has no tokenised pairs; pass those of unlabeled.data.preferences")

    @torch.no_grad()
    def held_out_metrics(self, dataset, prefix: str) -> dict[str, float]:
        """The loss and what the model prefers, over all pairs; the same for any number of processes and batch size.

        - eval_loss: the loss of training, with all its options, as the mean over the pairs.
        - preference_accuracy: the share of pairs whose chosen answer has the higher log-probability.
        - reward_accuracy: whose chosen answer has gained more over the reference; undecided pairs count a half.
        - reward_margin: the mean of beta times that gain of the chosen over the rejected answer, in nats.

        Each as in Rafailov et al. 2023 (arXiv:2305.18290), with log-probabilities summed over the answer's tokens, of
        which `ld_alpha` weights those that only the longer answer has in rewards, as in the loss.
        """
        args = self.args
        size = args.per_device_eval_batch_size
        mine = list(range(args.process_index, len(dataset), args.world_size))
        rounds = -(-len(dataset) // args.world_size)  # forward passes are collective under ZeRO-3
        references = self._reference if dataset is self.eval_dataset else {}
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(5, dtype=torch.float64)
        for start in range(0, rounds, size):
            places = mine[start : start + size]
            batch = compat.prepare_inputs(self, self.data_collator([dataset[place] for place in places or [0]]))
            chosen, rejected, weighted_gap = self._answers(batch)
            if start not in references:  # which stays as it is
                references[start] = self._reference_answers(batch)
            reference_chosen, reference_rejected = references[start]
            gain = weighted_gap - (reference_chosen - reference_rejected).double()
            margin = args.beta * gain
            if self._is_plain_sigmoid:
                losses = -torch.nn.functional.logsigmoid(margin)
            else:
                batch |= {"ref_chosen_logps": reference_chosen, "ref_rejected_logps": reference_rejected}
                with self.accelerator.autocast():
                    mean = self.compute_loss(self.model, batch)
                losses = mean.double().expand(len(margin))
            decided = (chosen > rejected).double()
            won = (gain > ROUNDING).double() + 0.5 * (gain.abs() <= ROUNDING).double()
            parts = [losses, decided, won, margin, torch.ones_like(margin)]
            if places:
                sums += torch.stack([part.sum() for part in parts]).cpu()
        compat.clear_eval_metrics(self)
        self.model.train(was_training)
        loss, preferred, won, margin, pairs = self.accelerator.reduce(sums.to(args.device), reduction="sum").tolist()
        return {
            "eval_loss": loss / pairs,
            "preference_accuracy": preferred / pairs,
            "reward_accuracy": won / pairs,
            "reward_margin": margin / pairs,
            "pairs": int(pairs),
        }

    @property
    def _is_plain_sigmoid(self) -> bool:
        """Whether the loss follows from the margin alone, so that TRL's need not be computed beside the rewards."""
        args = self.args
        is_sigmoid = args.loss_type == ["sigmoid"] and not args.loss_weights and not args.use_weighting
        return is_sigmoid and args.f_divergence_type == "reverse_kl"

    def _reference_answers(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the reference for the chosen and the rejected answers, (pairs,) each, in nats.

        Raises:
            UserError: the reference was the model before training, and is gone.
        """
        if "ref_chosen_logps" in batch:
            return batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        is_adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        if self.ref_model is None and not is_adapted and self.state.global_step > 0:
            raise UserError(
                "evaluate: the reference was computed before training for the pairs of the run alone; set "
                "precompute_ref_log_probs: false"
            )
        return self.compute_ref_log_probs(self.ref_model or self.model, batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Leave TRL's frozen copy of the adapter, the reference, in checkpoints only."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            shutil.rmtree(Path(output_dir or self.args.output_dir, "ref"), ignore_errors=True)

    def _answers(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the chosen answers, of the rejected ones, and their difference as `ld_alpha` weights it.

        float64 (pairs,) each, in nats.
        """
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            outputs = self.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        nats = outputs.log_probs.double()
        chosen, rejected = nats.sum(dim=1).chunk(2)
        if self.args.ld_alpha is None:
            return chosen, rejected, chosen - rejected
        place = batch["completion_mask"][:, 1:].cumsum(dim=1)  # 1, 2, ... within an answer
        shared = torch.minimum(*batch["completion_mask"][:, 1:].sum(dim=1).chunk(2)).repeat(2)
        weights = torch.where(place <= shared[:, None], 1.0, self.args.ld_alpha).double()
        weighted_chosen, weighted_rejected = (nats * weights).sum(dim=1).chunk(2)
        return chosen, rejected, weighted_chosen - weighted_rejected
