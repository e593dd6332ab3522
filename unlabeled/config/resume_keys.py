"""The keys of a run that may have other values when it is resumed."""

# They say where files go, how often something happens, or how a batch is divided; or they follow from other keys.
KEYS_FREE_TO_CHANGE_ON_RESUME = {
    "max_steps", "bf16", "torch_compile", "torch_compile_backend", "output_dir", "logging_steps",
    "logging_first_step", "eval_steps", "eval_strategy", "eval_on_start", "save_steps", "save_strategy",
    "save_total_limit", "report_to", "run_name", "project", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "deepspeed", "disable_tqdm", "push_to_hub",
    "logging_strategy", "log_on_each_node",
    "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "hub_always_push", "hub_revision", "compile",
    "train_data", "eval_data", "test_data", "prepared_dir",  # the manifest's fingerprint is of their content
    "use_cpu", "loss_spike_threshold", "max_hours", "ddp_timeout", "activation_checkpointing", "gradient_checkpointing",
}  # fmt: skip
