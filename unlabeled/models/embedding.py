"""Sentence embedders: a transformer and its pooling, as sentence-transformers stores them."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device, is_sentence_transformer_model

from unlabeled.config import AdapterArguments, EmbedArguments
from unlabeled.data.text import error_summary
from unlabeled.data.tokenization import ensure_pad_token
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import absolute_name, adapter_base
from unlabeled.models.adapters import build_lora_config
from unlabeled.models.exports import load_and_check_export
from unlabeled.models.loading import load_with_info
from unlabeled.models.vocabulary import fit_to_tokenizer
from unlabeled.models.weight_files import has_wrapper_prefix, without_wrapper_prefix
from unlabeled.runtime.files import read_json, read_json_object
from unlabeled.runtime.processes import print_on_main
from unlabeled.runtime.safe_loading import check_foreign_code

# Saving tries the model out for a model card of its own, and T5's encoder refuses the cache it is saved with.
logging.getLogger("sentence_transformers.base.model_card").setLevel(logging.ERROR)


def load_embedder_for_training(model_args: AdapterArguments, training_args: EmbedArguments) -> SentenceTransformer:
    """An embedder whose tokenizer has a pad token, with the adapter that the arguments ask for.

    Raises:
        UserError: as `load_embedder` does, or the adapter does not fit the model.
    """
    model = load_embedder(model_args, training_args)
    print_on_main(ensure_pad_token(model.tokenizer))
    has_grown = fit_to_tokenizer(model.transformers_model, model.tokenizer, training_args.max_length)
    if model_args.adapter != "none":
        if has_grown:
            raise UserError(
                f"the tokenizer of {model_args.model_name_or_path} has ids that its model has no vectors for, as for a "
                "new pad token, and an adapter cannot add them; set adapter: none"
            )
        add_embedder_adapter(model, build_lora_config(model_args, "FEATURE_EXTRACTION"))
    freeze_unused(model)
    return model


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


def add_embedder_adapter(model: SentenceTransformer, config: LoraConfig) -> None:
    """`SentenceTransformer.add_adapter`, with one sentence where there are no such modules to adapt.

    The config of the backbone stays with it: an adapter cannot go with a changed one.
    """
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


def embed(model: SentenceTransformer, texts: list[str], batch_size: int) -> torch.Tensor:
    """Embeddings of norm 1: float32 (texts, width), on the CPU."""
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    return model.encode(texts, batch_size=batch_size, **options).float().cpu()


def load_saved_embedder(folder: str, trained: SentenceTransformer, texts: list[str], args) -> SentenceTransformer:
    """The embedder of a folder as its users load it, after checking that it embeds some texts as the trained one does.

    Args:
        args: `EmbedArguments`.

    Raises:
        RuntimeError: the embeddings differ.
    """
    saved = SentenceTransformer(folder, device=str(args.device), local_files_only=True, trust_remote_code=False)
    batch_size = args.per_device_eval_batch_size
    difference = (embed(saved, texts, batch_size) - embed(trained, texts, batch_size)).abs().max()
    tolerance = 0.02 if args.bf16 else 1e-4
    if difference > tolerance:
        raise RuntimeError(f"{folder} is not what was trained: embeddings differ by {difference:.1e}")
    if not adapter_base(folder):  # whose base may have a head as well
        # Not by AutoModel, as only the encoder is saved of an encoder-decoder.
        load_and_check_export(type(trained.transformers_model), folder)
    return saved
