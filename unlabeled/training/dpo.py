"""`DPOTrainer` with exact evaluation and resume."""

import math
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
        """The dataset unchanged: `prepare_pairs` has tokenized it.

        TRL has no public way to pass ids. Its own tokenization loses the beginning of answers where the generation
        prompt of the chat template differs from what the template writes before an answer.
        """
        return dataset

    def check_dataset(self, dataset) -> None:
        columns = set(getattr(dataset, "column_names", None) or ())
        if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:
            raise UserError("evaluate: the data set has no tokenized pairs; pass those of unlabeled.data.preferences")

    @torch.no_grad()
    def held_out_metrics(self, dataset, prefix: str) -> dict[str, float]:
        """Loss and preferences over all pairs; the same for any number of processes and batch size.

        - `eval_loss`: the training loss with all its options, as the mean over the pairs.
        - `preference_accuracy`: the share of pairs whose chosen answer has the higher log-probability.
        - `reward_accuracy`: the share of pairs whose chosen answer has the higher reward; ties count one half.
        - `reward_margin`: the mean difference of the rewards of chosen and rejected answers, in nats.

        The reward of an answer is beta times its log-probability minus that under the reference (Rafailov et al. 2023,
        arXiv:2305.18290). Log-probabilities are summed over the tokens of the answer; in rewards, `ld_alpha` weights
        the tokens that only the longer answer has, as in the loss.
        """
        args = self.args
        batch_size = args.per_device_eval_batch_size
        own_rows = list(range(args.process_index, len(dataset), args.world_size))
        rounds = math.ceil(len(dataset) / args.world_size)  # equal for all, as forward passes are collective in ZeRO-3
        references = self._reference if dataset is self.eval_dataset else {}
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(5, dtype=torch.float64)
        for start in range(0, rounds, batch_size):
            rows = own_rows[start : start + batch_size]
            examples = [dataset[row] for row in rows or [0]]
            batch = compat.prepare_inputs(self, self.data_collator(examples))
            chosen, rejected, weighted_gap = self._answers(batch)
            if start not in references:  # the reference does not change
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
            is_preferred = (chosen > rejected).double()
            has_higher_reward = (gain > ROUNDING).double() + 0.5 * (gain.abs() <= ROUNDING).double()
            parts = [losses, is_preferred, has_higher_reward, margin, torch.ones_like(margin)]
            if rows:
                sums += torch.stack([part.sum() for part in parts]).cpu()
        compat.clear_eval_metrics(self)
        self.model.train(was_training)
        sums = self.accelerator.reduce(sums.to(args.device), reduction="sum")
        loss, preferred, higher_reward, margin, pairs = sums.tolist()
        return {
            "eval_loss": loss / pairs,
            "preference_accuracy": preferred / pairs,
            "reward_accuracy": higher_reward / pairs,
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
        position = batch["completion_mask"][:, 1:].cumsum(dim=1)  # 1, 2, ... within an answer
        shared = torch.minimum(*batch["completion_mask"][:, 1:].sum(dim=1).chunk(2)).repeat(2)
        weights = torch.where(position <= shared[:, None], 1.0, self.args.ld_alpha).double()
        weighted_chosen, weighted_rejected = (nats * weights).sum(dim=1).chunk(2)
        return chosen, rejected, weighted_chosen - weighted_rejected
