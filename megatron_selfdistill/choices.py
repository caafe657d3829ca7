# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The values that keys of the configuration can take, each list once: the schema checks them and the code uses them.

This file imports nothing, so that the schema can be read where torch is not installed.
"""

from __future__ import annotations

TARGET_RULES = ("entropy_matched", "fixed", "batch", "teacher_alone")
"""Values of target.rule, the rule for k, the temperature of the mix."""

GPU_MEMORY_GB = {"H100": 79.1, "H200": 139.7, "B200": 178.3}
"""Values of cluster.gpu -> the memory of such a GPU in GiB, as PyTorch reports it."""

GPUS = tuple(GPU_MEMORY_GB)
"""Values of cluster.gpu."""

ANCHORS = ("student", "reference")
"""Values of target.anchor, the model that the teacher is mixed with, and of target.match, whose entropy is matched."""

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
"""Values of loss.divergence."""
MAX_RENYI_ORDER = 4.0
"""The largest order of a Renyi divergence."""

LOSS_BACKENDS = ("torch", "triton")
"""Values of loss.backend; null chooses one of them."""

FUSED_MODES = ("keep_gradient", "low_memory")
"""Values of loss.fused under which the output layer and the loss are computed together, fastest first."""

LOSS_FUSED = ("none", *FUSED_MODES)
"""Values of loss.fused; null chooses one of them by the memory that the logits take."""

FINISH_REASONS = ("stop", "length")
"""The ways in which a response ends: with a stop token, or at its greatest length."""

NORMALIZATIONS = ("RMSNorm", "LayerNorm")
"""Values of model.normalization."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu")
"""Values of model.activation."""

ROUTER_SCORES = ("softmax", "sigmoid")
"""Values of model.moe_router_score_function."""

POSITION_EMBEDDINGS = ("rope", "yarn", "learned_absolute", "none")
"""Values of model.position_embedding_type."""

UPDATE_MODES = ("wait", "keep")
"""Values of rollout.at_update, the fate of responses under way when servers get new weights."""

PAIR_ORDERS = ("teacher_first", "alternating")
"""Values of schedule.pair_order; null chooses one of them by the number of stages."""

RECOMPUTE_GRANULARITIES = ("selective", "full")
"""Values of schedule.recompute.granularity; null recomputes nothing."""

RECOMPUTE_METHODS = ("uniform", "block")
"""Values of schedule.recompute.method, as Megatron spells them."""

DATA_KINDS = ("problems", "conversations")
"""Values of data.kind."""

SOLUTION_SOURCES = ("given", "answer", "other", "none")
"""Values of data.solutions."""
HINT_LEVELS = {"solution": "given", "answer": "answer", "other": "other", "none": "none"}
"""Name of a hint in commands that compare hints -> the value of data.solutions that shows it."""

BAD_RECORD_POLICIES = ("error", "skip")
"""Values of data.on_bad_record."""

LONG_CONTEXT_POLICIES = ("error", "drop", "truncate_start", "truncate_end")
"""Values of data.on_long_context."""

ACCEPTED_RULES = ("closing_turn", "marked")
"""Values of conversations.accepted_rule besides dotted paths."""

CONVERSATION_TURNS = ("all", "before_accepted")
"""Values of conversations.turns."""

CONVERSATION_RESPONSES = ("logged", "sampled")
"""Values of conversations.responses."""

SOLUTION_RANKINGS = ("shortest", "most_likely", "random", "learnable")
"""Values of method.pick of method.name=own_solutions, and of `selfdistill solutions --pick`."""

ENGINES = ("megatron", "vllm")
"""Values of rollout.engine."""

PLACEMENTS = ("colocated", "server")
"""Values of rollout.placement."""

TRANSFERS = ("shared_memory", "gloo", "nccl")
"""Values of rollout.transfer; null chooses one of them by what the servers can reach."""

GUIDANCES = ("none", "mixed")
"""Values of rollout.guidance."""

ROLLOUT_CORRECTIONS = ("none", "truncated", "truncated_sequence")
"""Values of loss.rollout_correction."""

NORMALIZES = ("tokens", "sequences", "prompts")
"""Values of loss.normalize."""

TEACHER_WEIGHTS = ("frozen", "ema", "current")
"""Values of teacher.weights."""

TEACHER_OFFLOADS = ("none", "cpu")
"""Values of teacher.offload."""

OPTIMIZERS = ("adam", "sgd")
"""Values of optimizer.optimizer."""

PRECISIONS = ("bf16", "fp32")
"""Values of optimizer.precision."""

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
"""Values of optimizer.lr_decay.style, as Megatron spells them."""

VERIFIERS = ("math_verify", "exact_match")
"""Values of evaluation.verifier besides dotted paths."""

LOGGERS = ("tensorboard", "wandb")
"""Values that metrics.loggers may hold besides dotted paths; each is also the name of the package that it needs."""

VERIFY_LEVELS = ("checksums", "sizes", "none")
"""Values of checkpoint.verify."""
