"""Keys of the libraries' configuration classes that have to keep their default, and the reason or the remedy.

docs/support_matrix.md lists what becomes of every key, and tests/test_options.py fails when a release adds one.
"""

_ROW_ORDER = "the order of the rows is part of the run"
_OWN_EVALUATION = "evaluation adds up losses of its own"
_WHOLE_CHECKPOINT = "a checkpoint has to hold all that a resumed run needs"
_NO_EFFECT = "it has no effect here"
_PREPARED_ROWS = "rows are rendered, packed and masked by unlabeled.data.preparing"
_FIXED_REFERENCE = "the reference is the model that the run starts from"

TRAINER_KEYS = {
    "max_steps": "it follows from train_tokens and batch_tokens",
    "num_train_epochs": "it follows from train_tokens",
    "gradient_accumulation_steps": "it follows from batch_tokens",
    "torch_compile": "set compile instead",
    "average_tokens_across_devices": "the loss is the mean over the targets of all processes",
    "bf16": "set precision instead",
    "fp16": "set precision instead",
    "bf16_full_eval": "set precision instead",
    "fp16_full_eval": "set precision instead",
    "optim": "set optimizer instead",
    "optim_args": "set optimizer instead",
    "optim_target_modules": "set optimizer instead",
    "data_seed": "set seed instead",
    "label_smoothing_factor": "the loss is plain cross entropy",
    "resume_from_checkpoint": "the same command again resumes from the newest complete checkpoint",
    "ignore_data_skip": "a resumed run has to see the text that an uninterrupted one would",
    "save_only_model": _WHOLE_CHECKPOINT,
    "restore_callback_states_from_checkpoint": _WHOLE_CHECKPOINT,
    "save_on_each_node": "a checkpoint is written once, to a disk that all nodes share",
    "enable_jit_checkpoint": "a run saves by itself on SIGTERM, SIGINT and SIGUSR1",
    "load_best_model_at_end": "it is not supported",
    "auto_find_batch_size": "it is not supported",
    "metric_for_best_model": "the last model is the result",
    "greater_is_better": "the last model is the result",
    "remove_unused_columns": "collators need every column",
    "logging_nan_inf_filter": "a NaN must show",
    "label_names": "collators name the labels",
    "use_cache": "a cache would let packed documents see each other",
    "train_sampling_strategy": _ROW_ORDER,
    "length_column_name": _ROW_ORDER,
    "dataloader_in_order": _ROW_ORDER,
    "dataloader_drop_last": "no batch is ever cut short",
    "accelerator_config": "it would change what a batch is",
    "include_num_input_tokens_seen": "every entry of the history has its tokens",
    "skip_memory_metrics": "metrics.json has the peak memory",
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "do_train": _NO_EFFECT,
    "do_eval": "set eval_strategy instead",
    "do_predict": _NO_EFFECT,
    "parallelism_config": "tensor, context and sequence parallelism are not supported; use DDP or ZeRO",
    "fsdp": "FSDP is not supported; use DDP, or ZeRO from ds_configs/",
    "fsdp_config": "FSDP is not supported",
}

_TRL_KEYS = {
    "model_init_kwargs": "the recipe loads the model",
    "trust_remote_code": "models are those of transformers",
    "router_aux_loss_coef": "evaluation and training have one loss; set it in the model's config",
}

SFT_KEYS = {
    **TRAINER_KEYS,
    **_TRL_KEYS,
    "packing": _PREPARED_ROWS,
    "packing_strategy": _PREPARED_ROWS,
    "padding_free": _PREPARED_ROWS,
    "eval_packing": _PREPARED_ROWS,
    "completion_only_loss": _PREPARED_ROWS,
    "eos_token": _PREPARED_ROWS,
    "pad_token": _PREPARED_ROWS,
    "pad_to_multiple_of": _PREPARED_ROWS,
    "assistant_only_loss": _PREPARED_ROWS,
    "dataset_kwargs": _PREPARED_ROWS,
    "dataset_text_field": _PREPARED_ROWS,
    "dataset_num_proc": _PREPARED_ROWS,
    "shuffle_dataset": _PREPARED_ROWS,
    "truncation_mode": _PREPARED_ROWS,
    "chat_template_path": "set chat_template instead",
    "loss_type": "evaluation and training have one loss, cross entropy",
}

DPO_KEYS = {
    **TRAINER_KEYS,
    **_TRL_KEYS,
    "train_tokens": "set train_pairs instead",
    "batch_tokens": "set batch_pairs instead",
    "truncation_mode": _PREPARED_ROWS,
    "dataset_num_proc": _PREPARED_ROWS,
    "pad_token": _PREPARED_ROWS,
    "padding_free": _PREPARED_ROWS,
    "sync_ref_model": _FIXED_REFERENCE,
    "ref_model_mixup_alpha": _FIXED_REFERENCE,
    "ref_model_sync_steps": _FIXED_REFERENCE,
    "neftune_noise_alpha": "the reference would be noisy as well",
}

DOWNSTREAM_KEYS = {
    **TRAINER_KEYS,
    "train_tokens": "set train_examples instead",
    "batch_tokens": "set batch_examples instead",
    "metric_for_best_model": "it follows from the labels",
    "load_best_model_at_end": "set early_stopping_patience",
}

EMBEDDING_KEYS = {
    **TRAINER_KEYS,
    "train_tokens": "set train_pairs instead",
    "batch_tokens": "set batch_pairs instead",
    "deepspeed": "it cannot replay a batch in pieces; launch with torchrun",
    "fsdp": "launch with torchrun",
    "batch_sampler": _ROW_ORDER,
    "multi_dataset_batch_sampler": _ROW_ORDER,
    "prompts": "put them into the texts",
    "compile": "it is not supported",
    "warmup_ratio": "set warmup_steps below 1",
    "learning_rate_mapping": "all parameters have one learning rate",
    "router_mapping": "models with routers are not supported",
    "neftune_noise_alpha": "a text is embedded twice and has to give the same vector",
    "ddp_broadcast_buffers": "sentence-transformers switches it off",
}
