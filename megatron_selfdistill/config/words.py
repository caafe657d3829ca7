# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Other names of keys: short names, and the words of other programs."""

from __future__ import annotations

SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "lr": "optimizer.lr",
    "batch": "data.global_batch_size",
    "steps": "num_steps",
}
"""The short name of a key on a command line -> the key."""

_WORDS = {
    "run_dir": "output_dir save_dir default_local_dir save save_path ckpt_path output out",
    "num_steps": "max_steps max_num_steps total_training_steps train_iters max_iters num_rollout",
    "num_steps: steps = epochs x problems / data.global_batch_size": (
        "epochs num_epochs num_train_epochs max_epochs max_num_epochs total_epochs num_episodes epoch"
    ),
    "seed": "random_seed data_seed",
    "optimizer.optimizer": "optim",
    "optimizer.precision": "dtype torch_dtype bf16 fp16",
    "optimizer.lr": "learning_rate max_lr actor_learning_rate",
    "optimizer.lr_warmup_steps": "warmup_steps num_warmup_steps warmup_ratio",
    "optimizer.lr_decay.style": "lr_scheduler lr_scheduler_type",
    "optimizer.clip_grad": "max_grad_norm grad_clip gradient_clipping clip_grad_norm",
    "schedule.max_tokens: microbatches follow from it and from data.global_batch_size": (
        "gradient_accumulation_steps micro_batch_size train_micro_batch_size ppo_micro_batch_size_per_gpu"
    ),
    "schedule.recompute.granularity": "gradient_checkpointing activation_checkpointing",
    "data.global_batch_size": (
        "batch_size per_device_train_batch_size train_batch_size train_global_batch_size num_prompts_per_step"
    ),
    "data.path": "data dataset datasets dataset_name data_path data_files train_file train_files",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "data.max_length": "max_seq_length max_seq_len sequence_len seq_length cutoff_len max_total_sequence_length",
    "rollout.max_new_tokens": "max_completion_length max_response_length generate_max_len",
    "rollout.num_samples": "num_generations num_generations_per_prompt n n_samples_per_prompt",
    "rollout.engine": "use_vllm vllm",
    "rollout.engine_tp": "vllm_tensor_parallel_size",
    "checkpoint.load": "model model_name model_name_or_path model_path base_model load hf_checkpoint pretrain",
    "checkpoint.save_every": "save_steps save_freq save_period save_interval",
    "checkpoint.keep_last": "save_total_limit max_ckpt_to_keep",
    "checkpoint.resume": "resume_from_checkpoint resume_mode",
    "evaluation.path": "eval_dataset val_file val_files val_data eval_data eval_file test_file validation_file",
    "evaluation.every": "eval_steps eval_freq test_freq val_period",
    "metrics.loggers": "report_to logger metric_logger log_with use_wandb wandb",
    "metrics.console_every": "logging_steps log_every_n_steps log_interval",
    "adapter.rank": "lora_r lora_rank r lora",
    "adapter.alpha": "lora_alpha",
    "adapter.layers": "lora_target_modules target_modules lora_attn_modules",
    "parallel.tensor_model_parallel_size": "tensor_parallel_size",
    "parallel.pipeline_model_parallel_size": "pipeline_parallel_size",
    "parallel.expert_model_parallel_size": "expert_parallel_size",
    "cluster.num_gpus: --ranks N starts N ranks": "n_gpus world_size nproc_per_node gpus ngpus",
    "cluster.gpus_per_node": "n_gpus_per_node",
}
WORDS = {word: key for key, words in _WORDS.items() for word in words.split()}
"""The word of another program for a key -> the key, and after a colon what to do."""
