"""Sentence embeddings: pairs of texts that belong together, read, ordered, embedded, scored and shown."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device, is_sentence_transformer_model
from torch.utils.data import SequentialSampler

from unlabeled.config import AdapterArguments, EmbedArguments
from unlabeled.data.pairs import GRADES, text_columns
from unlabeled.data.text import error_summary
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import absolute_name, adapter_base
from unlabeled.models.exports import load_and_check_export
from unlabeled.models.loading import load_with_info
from unlabeled.models.weight_files import has_wrapper_prefix, without_wrapper_prefix
from unlabeled.runtime.files import read_json, read_json_object
from unlabeled.runtime.safe_loading import check_foreign_code
from unlabeled.training import ExactTrainerMixin

# Saving tries the model out for a card that `finish` replaces, and T5's encoder refuses the cache it is saved with.
logging.getLogger("sentence_transformers.base.model_card").setLevel(logging.ERROR)

SCALE = 20.0  # of the cosines in the softmax: the inverse of a temperature of 0.05, as in sentence-transformers


def describe_batch(args: EmbedArguments, negatives: int = 0) -> str:
    """A line for the plan; `negatives` is the number of hard negatives of a pair."""
    hard = f" and {args.batch_pairs * negatives:,} hard negatives" if negatives else ""
    return (
        f"{args.batch_pairs:,} pairs over {args.world_size} process{'es' if args.world_size > 1 else ''}, each anchor "
        f"among {args.batch_pairs:,} positives{hard}, {args.per_device_train_batch_size} embedded at a time, "
        f"{args.max_steps:,} steps"
    )


# --- Model ------------------------------------------------------------------------------------------------------------


def load_embedder(model_args: AdapterArguments, args: EmbedArguments) -> SentenceTransformer:
    """The modules of a folder of sentence-transformers, or any model with pooling on top; weights in float32."""
    name = os.path.expanduser(model_args.model_name_or_path)
    if adapter_base(name):
        raise UserError(f"{name} is an adapter; merge it first with scripts/merge_adapter.py")
    if model_args.adapter == "qlora":
        raise UserError("adapter: qlora is not supported for embeddings; set it to lora")
    if model_args.adapter != "none" and has_wrapper_prefix(name):
        raise UserError(
            f"the weights of {name} are named as in a wrapped model, so nobody could load an adapter onto it; save it "
            "anew from the model inside the wrapper, or set adapter: none"
        )
    check_modules(name)
    options = {"dtype": torch.float32, "attn_implementation": model_args.attn_implementation}
    try:
        with without_wrapper_prefix(name) as folder:
            model = SentenceTransformer(
                folder,
                device=str(args.device),
                local_files_only=os.path.isdir(name),
                trust_remote_code=False,
                model_kwargs=options | {"use_safetensors": True},
                processor_kwargs={"split_special_tokens": True},  # their names in a text are text; saved as well
            )
            backbone = model.transformers_model
            # Loaded once more, because sentence-transformers does not hand on which weights were missing.
            subfolder = backbone_folder(folder)
            more: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
            load_with_info(type(backbone), folder, model_args.attn_implementation, quiet=True, **more)
            backbone.name_or_path = backbone.config.name_or_path = name
    except UserError:
        raise
    except Exception as error:  # a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")[:200]
        raise UserError(f"model_name_or_path {name} cannot be loaded ({reason}); set it to another model") from error
    if not is_sentence_transformer_model(name, local_files_only=os.path.isdir(name)):
        model[1] = Pooling(model.get_embedding_dimension(), args.pooling or "mean")
    elif args.pooling:
        raise UserError(f"{name} has a pooling of its own; remove pooling")
    if args.is_causal is not None:
        if model_args.adapter != "none":  # whose folder has no config
            raise UserError(
                "is_causal is kept in the config, which an adapter has none of; remove it, or set adapter: none"
            )
        model.config.is_causal = args.is_causal  # read at each forward pass, and saved
    model.max_seq_length = args.max_length
    return model


def check_modules(folder: str) -> None:
    """Raise `UserError` where a local folder of sentence-transformers names other modules than its own, or pickles."""
    check_foreign_code(folder)
    file = Path(folder, "modules.json")
    if not file.exists():
        return
    remedy = "restore it, or set another model"
    try:
        modules = {str(module["path"]): str(module["type"]) for module in read_json(file)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} names no modules ({error_summary(error)}); {remedy}") from error
    for path, name in modules.items():
        if not name.startswith("sentence_transformers."):
            raise UserError(
                f"model_name_or_path: {file} names {name}, a program that is not part of sentence-transformers and is "
                "not run; choose another model"
            )
        check_foreign_code(Path(folder, path))
        configuration = Path(folder, path, "config.json")
        settings = read_json_object(configuration, remedy) if configuration.exists() else {}
        activation = settings.get("activation_function", "torch.")
        if not str(activation).startswith("torch."):  # which sentence-transformers would replace, with a warning
            raise UserError(
                f"model_name_or_path: {configuration} names the activation function {activation}, "
                "a program that is not part of torch and is not run; choose another model"
            )


def backbone_folder(folder: str) -> str:
    """Where in a local folder of sentence-transformers its transformers model lies; "" is the folder itself."""
    file = Path(folder, "modules.json")
    if not file.exists():
        return ""
    try:
        return str(read_json(file)[0]["path"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} names no module ({error_summary(error)}); restore it, or set another model") from error


def add_adapter(model: SentenceTransformer, config: LoraConfig) -> None:
    """`SentenceTransformer.add_adapter`, with one sentence where there are no such modules to adapt.

    The config of the backbone stays with it: an adapter cannot go with a changed one.
    """
    if config.target_modules != "all-linear":
        config.target_modules = set(config.target_modules.split(","))
    try:
        model.add_adapter(config)
        for adapter in model.transformers_model.peft_config.values():
            adapter.base_model_name_or_path = absolute_name(adapter.base_model_name_or_path)
    except ValueError as error:
        reason = str(error).split(". ")[0].rstrip(".")[:200]
        raise UserError(f"lora_target_modules: {reason}; all-linear fits any model") from error


def freeze_unused(model: SentenceTransformer) -> None:
    """Freeze what no embedding depends on, such as BERT's pooler: DDP would wait for its gradients."""
    model(batch_to_device(model.preprocess(["text"]), model.device))["sentence_embedding"].sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def embed(model: SentenceTransformer, texts: list[str], args) -> torch.Tensor:
    """float32 (texts, width) on the CPU, each of length 1."""
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    return model.encode(texts, batch_size=args.per_device_eval_batch_size, **options).float().cpu()


def check_saved(folder: str, model: SentenceTransformer, texts: list[str], args) -> SentenceTransformer:
    """The model as its users will load it, after making sure that it embeds the texts as the trained one does."""
    saved = SentenceTransformer(folder, device=str(args.device), local_files_only=True, trust_remote_code=False)
    difference = (embed(saved, texts, args) - embed(model, texts, args)).abs().max()
    if difference > (0.02 if args.bf16 else 1e-4):
        raise RuntimeError(f"{folder} is not what was trained: embeddings differ by {difference:.1e}")
    if not adapter_base(folder):  # whose base may have a head as well
        # The class of AutoModel, except where only the encoder of an encoder-decoder is saved.
        load_and_check_export(type(model.transformers_model), folder)
    return saved


def same_texts(pairs: Dataset, column: str) -> torch.Tensor:
    """Which negatives are the anchor or the positive of which pair: bool (pairs, negatives)."""
    places: dict[str, list[int]] = {}
    for place, text in enumerate(pairs[column]):
        places.setdefault(text, []).append(place)
    same = torch.zeros(len(pairs), len(pairs), dtype=torch.bool)
    for name in ("anchor", "positive"):
        for row, text in enumerate(pairs[name]):
            same[row, places.get(text, [])] = True
    return same


def neighbours(before: SentenceTransformer, after: SentenceTransformer, pairs: Dataset, args) -> str:
    """Markdown: the nearest held-out positives of a few anchors, before and after."""
    lines = ["The nearest of all held-out positives to the first anchors, before and after this stage.", ""]
    anchors, texts = pairs["anchor"][:3], pairs["positive"][:]
    found = [(embed(model, anchors, args) @ embed(model, texts, args).T).max(dim=1) for model in (before, after)]
    for row, anchor in enumerate(anchors):
        shown = {"Anchor": anchor, "Its positive": texts[row]}
        for when, (cosines, places) in zip(("before", "after"), found, strict=True):
            shown[f"Nearest {when} (cosine {cosines[row]:.2f})"] = texts[places[row]]
        for heading, text in shown.items():
            lines += [f"**{heading}**", "", *(f"    {line}" for line in text.splitlines()), ""]
        lines += ["---", ""]
    return "\n".join(lines)


# --- Training ---------------------------------------------------------------------------------------------------------


class ExactEmbeddingMixin(ExactTrainerMixin):
    """`ExactTrainerMixin` for `SentenceTransformerTrainer`: rows in order, and held-out metrics of pairs."""

    def get_batch_sampler(self, dataset, batch_size: int, drop_last: bool, **_) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer calls this in every process, and sentence-transformers writes the same files in each."""
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def add_model_card_callback(self, default_args_dict: dict) -> None:
        """Leave the card to `finish`."""

    @property
    def rows_per_epoch(self) -> int:
        """Pairs of the whole batches of an epoch, see `order_of_pairs`."""
        pairs = self.splits["train"]["rows"]
        return pairs - pairs % self.args.batch_pairs

    def check_dataset(self, dataset) -> None:
        if not {"anchor", "positive"} <= set(getattr(dataset, "column_names", None) or ()):
            raise UserError("evaluate: the data set needs the columns anchor and positive")

    def held_out_metrics(self, dataset: Dataset, prefix: str) -> dict[str, float]:
        """The same for any evaluation batch and any number of processes, each of which embeds every text.

        - eval_loss: as in training, each anchor with the positives and the hard negatives of the next pairs,
          `batch_pairs` in all; but for negatives that are the anchor or its positive again.
        - accuracy_at_1, mrr: of its own positive among all held-out positives; ties count as lost.
        - spearmanr: of the cosine and what an anchor shares with a text: the passage (`positive`), the work
          (`same_work`) or nothing (`other_work`), where the data have these columns.
        """
        pairs = dataset
        was_training = self.model.training
        vectors = {name: embed(self.model, pairs[name][:], self.args) for name in GRADES if name in pairs.column_names}
        anchors = embed(self.model, pairs["anchor"][:], self.args)
        cosines, count = anchors @ vectors["positive"].T, len(pairs)
        window = (torch.arange(count)[:, None] + torch.arange(min(self.args.batch_pairs, count))) % count
        candidates = [cosines.gather(1, window)]
        for name in text_columns(pairs)[2:]:
            negatives = anchors @ embed(self.model, pairs[name][:], self.args).T
            candidates.append(negatives.masked_fill(same_texts(pairs, name), -math.inf).gather(1, window))
        losses = -(SCALE * torch.cat(candidates, dim=1)).log_softmax(dim=1)[:, 0]
        self.model.train(was_training)
        rank = (cosines >= cosines.diag()[:, None]).sum(dim=1)
        found = {"eval_loss": losses.mean(), "accuracy_at_1": (rank == 1).double().mean(), "mrr": (1 / rank).mean()}
        if len(vectors) == len(GRADES):
            graded = torch.cat([(anchors * vectors[name]).sum(dim=1) for name in GRADES])
            found["spearmanr"] = spearmanr(np.repeat(list(GRADES.values()), count), graded).statistic
            found["spearmanr"] = 0.0 if math.isnan(found["spearmanr"]) else found["spearmanr"]  # all embeddings alike
        return {name: float(value) for name, value in found.items()} | {"pairs": count}
