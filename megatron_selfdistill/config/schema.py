# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schema of the whole configuration: one frozen dataclass per section, a default and a meaning per field."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_selfdistill.config.environment import FromEnvironment, Place, hidden


class ConfigError(ValueError):
    """A configuration that cannot run, in one sentence: the key, what was expected, what it got.

    The sentence does not quote what was read from the environment (`environment.hidden`)."""

    def __init__(self, sentence: str) -> None:
        super().__init__(hidden(sentence))


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


PATHS = frozenset(
    "run_dir data.path data.tokenizer data.chat_template checkpoint.load evaluation.path rollout.hf_config "
    "rollout.server_python rollout.transfer_dir rollout.replay rollout.record".split()
)
"""Keys whose values are paths: a leading ``~`` in them is the user's home folder."""
MAX_SEED = 2**32 - 1


def _tidy(section: str, values: Any) -> None:
    """Bring a section's values into their final form: no text is null, ``~`` in a path is the home folder.

    Raises: `ConfigError` for a number that is not finite.
    """
    for f in fields(values):
        key, value = f"{section}.{f.name}".lstrip("."), getattr(values, f.name)
        if value == "" and f.type == "str | None":
            object.__setattr__(values, f.name, None)
        elif key in PATHS and isinstance(value, str):
            object.__setattr__(values, f.name, os.path.expanduser(value))
        _require_finite(key, value)


def _require_finite(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, entry in value.items():
            _require_finite(f"{key}.{name}", entry)
    elif isinstance(value, list):
        for entry in value:
            _require_finite(key, entry)
    _require(not isinstance(value, float) or math.isfinite(value), f"{key} must be a finite number, got {value}")


def _at_least(least: float, section: str, values: Any, names: str) -> None:
    """Each of the named fields is null or at least ``least``."""
    for name in names.split():
        value = getattr(values, name)
        _require(value is None or value >= least, f"{section}.{name} must be at least {least}, got {value}")


def _one_of(key: str, value: Any, choices: Iterable[str]) -> None:
    choices = list(choices)
    spelt = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), spelt, n=1)
    hint = f"; did you mean {spelt[near[0]]!r}?" if near else ""
    _require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value!r}{hint}")


@dataclass(frozen=True)
class ModelConfig:
    """What the model is.  Field names are Megatron Core's ``TransformerConfig``'s and ``GPTModel``'s."""

    provider: str | None = None
    """Dotted path of a function ``model_provider(pre_process, post_process, vp_stage) -> GPTModel``
    (Megatron-LM's signature); it replaces every architecture field below except ``vocab_size``."""
    vocab_size: int | None = None
    """Valid rows of the output layer, before Megatron's padding; null takes the tokenizer's size."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times the tensor-parallel size."""
    num_layers: int = 2
    """Transformer layers."""
    hidden_size: int = 64
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null is 4 * hidden_size."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int | None = None
    """Key and value heads (grouped-query attention); null is num_attention_heads."""
    kv_channels: int | None = None
    """Channels per head; null is hidden_size / num_attention_heads."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens, that the model may see."""
    position_embedding_type: str = "rope"
    """rope, learned_absolute or none."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of the channels that rotate."""
    rope_scaling: bool = False
    """Llama 3's frequency scaling."""
    rope_scaling_factor: float = 8.0
    """Factor of Llama 3's frequency scaling."""
    normalization: str = "RMSNorm"
    """RMSNorm or LayerNorm."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every normalisation."""
    gated_linear_unit: bool = True
    """SwiGLU-style MLP (with activation silu)."""
    activation: str = "silu"
    """silu, gelu (exact, by the error function) or gelu_tanh (its tanh approximation); the same on every device."""
    add_bias_linear: bool = False
    """Biases in all linear layers."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the word embeddings."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights, where no checkpoint is loaded."""
    num_moe_experts: int | None = None
    """Experts per MoE layer; null is a dense model."""
    moe_router_topk: int = 2
    """Experts per token."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert; null is ffn_hidden_size."""
    moe_aux_loss_coeff: float = 0.0
    """Load-balancing loss; 0 by default, since self-distillation should not move the router by itself."""
    moe_z_loss_coeff: float | None = None
    """Router z-loss; null is none."""
    moe_router_enable_expert_bias: bool = False
    """Auxiliary-loss-free balancing by expert biases."""
    moe_router_score_function: str = "softmax"
    """softmax or sigmoid (sigmoid is what expert biases need)."""
    allow_untested_fp8: bool = False
    """Let ``model.transformer.fp8`` be set, which has never run on hardware here."""
    num_passthrough_mtp_layers: int = 0
    """Multi-token-prediction layers that a checkpoint holds for others: converted both ways, never built or trained."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Any further ``TransformerConfig`` field by its own name; it overrides what this project derives."""

    def __post_init__(self) -> None:
        _tidy("model", self)
        sizes = "vocab_size make_vocab_size_divisible_by num_layers hidden_size ffn_hidden_size kv_channels"
        _at_least(1, "model", self, f"{sizes} num_attention_heads num_query_groups max_position_embeddings")
        _at_least(1, "model", self, "num_moe_experts moe_router_topk moe_ffn_hidden_size")
        _at_least(0, "model", self, "num_passthrough_mtp_layers")
        _one_of("model.normalization", self.normalization, ["RMSNorm", "LayerNorm"])
        _one_of("model.activation", self.activation, ["silu", "gelu", "gelu_tanh"])
        _one_of(
            "model.position_embedding_type",
            self.position_embedding_type,
            ["rope", "learned_absolute", "none"],
        )
        if self.kv_channels is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_attention_heads "
                f"({self.num_attention_heads}), or set model.kv_channels",
            )
        groups = self.num_query_groups or self.num_attention_heads
        _require(
            self.num_attention_heads % groups == 0,
            f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"model.num_query_groups ({groups})",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut.  What remains of the world size is data parallelism."""

    tensor_model_parallel_size: int = 1
    """TP: ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """PP: stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """VPP: model chunks per stage (the interleaved schedule); null is none."""
    context_parallel_size: int = 1
    """CP: ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """EP: ranks that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """ETP: tensor parallelism inside an expert; null is the same as TP."""
    sequence_parallel: bool = False
    """SP: cut activations between the tensor-parallel regions along the sequence; with MoE and TP it must be
    on."""
    distributed_timeout_minutes: float = 30.0
    """How long a collective may wait before the run ends."""

    def __post_init__(self) -> None:
        _tidy("parallel", self)
        axes = "tensor_model pipeline_model context expert_model expert_tensor".split()
        _at_least(1, "parallel", self, " ".join(f"{axis}_parallel_size" for axis in axes))
        _require(
            self.distributed_timeout_minutes > 0,
            f"parallel.distributed_timeout_minutes must be positive, got {self.distributed_timeout_minutes}",
        )
        vpp = self.virtual_pipeline_model_parallel_size
        if vpp is not None:
            _require(
                vpp >= 2,
                f"parallel.virtual_pipeline_model_parallel_size must be null or at least 2, got {vpp}",
            )
            _require(
                self.pipeline_model_parallel_size > 1,
                f"parallel.virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size > 1",
            )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel=true needs tensor_model_parallel_size > 1",
        )


@dataclass(frozen=True)
class ClusterConfig:
    """The machine that a run is made for: what dry_run=true without a launch checks it against."""

    num_gpus: int | None = None
    """Ranks of the whole launch, one per GPU; a launch of another size is refused.  Null takes any."""
    gpus_per_node: int = 8
    """GPUs of one node."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU, in GiB."""
    reserved_gb: float = 6.0
    """What CUDA, NCCL, an engine's workspace and fragmentation take of it, by the dry run's reckoning, in GiB."""
    host_memory_gb: float = 1000.0
    """Host memory of one node that the tensors of a run may take, in GiB: leave a few GiB per rank for the processes
    themselves."""

    def __post_init__(self) -> None:
        _tidy("cluster", self)
        _at_least(1, "cluster", self, "num_gpus gpus_per_node")
        _at_least(0, "cluster", self, "gpu_memory_gb reserved_gb host_memory_gb")
        num_gpus, per_node = self.num_gpus, self.gpus_per_node
        _require(
            num_gpus is None or num_gpus <= per_node or num_gpus % per_node == 0,
            f"cluster.num_gpus ({num_gpus}) must be a multiple of cluster.gpus_per_node ({per_node}), or fit on a node",
        )


@dataclass(frozen=True)
class DataConfig:
    """Problems, tokenizer and prompts."""

    kind: str = "problems"
    """problems (with solutions) or conversations (logs of chats; see the section ``conversations``)."""
    path: str | None = None
    """Problems and solutions, or conversations: a file (.jsonl, .json, .csv, each also .gz, or .parquet), a folder of
    such files, a glob, or the name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set; null is its default one."""
    fields: dict[str, str] = field(default_factory=dict)
    """Our field name -> the column's name, for problem, solution, answer, id, messages; of conversations: messages,
    accepted, tools, id."""
    on_bad_record: str = "error"
    """error: the first bad record ends the run; skip: count it and go on."""
    limit: int | None = None
    """Use only the first so many records."""
    tokenizer: str | None = None
    """A Hugging Face folder or a SentencePiece .model file."""
    trust_remote_code: bool = False
    """Run the Python code in the tokenizer's folder that its auto_map names.  The code can do whatever you can do: read
    it first."""
    allow_other_tokenizer: bool = False
    """Take a tokenizer whose tokens differ from those of the tokenizer that the checkpoint carries."""
    chat_template: str | None = None
    """Jinja chat template (or the path of one); null takes the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables for the chat template, such as enable_thinking."""
    system_prompt: str | None = None
    """Put before the conversation in both contexts."""
    student_template: str = "{problem}"
    """What the student is shown."""
    teacher_template: str | None = None
    """What the teacher is shown, with the slots {problem} and {solution}; null takes the wording in
    prompts.py."""
    global_batch_size: int = 32
    """Problems (of conversations: turns) per step, over all data-parallel ranks."""
    max_length: int | None = None
    """Longest context in tokens; null is model.max_position_embeddings."""
    on_long_context: str = "error"
    """What to do where the teacher's context cannot fit: error, drop, truncate_start or truncate_end of the
    solution."""
    solutions: str = "given"
    """Which solutions the teacher is shown: given (the data's) or own (the model's own responses whose answer verifies;
    see the section ``solutions``)."""

    def __post_init__(self) -> None:
        _tidy("data", self)
        _one_of("data.kind", self.kind, ["problems", "conversations"])
        _one_of("data.solutions", self.solutions, ["given", "own"])
        _one_of("data.on_bad_record", self.on_bad_record, ["error", "skip"])
        _one_of("data.on_long_context", self.on_long_context, ["error", "drop", "truncate_start", "truncate_end"])
        _at_least(1, "data", self, "global_batch_size limit max_length")
        known = {"problem", "solution", "answer", "id", "messages"}
        if self.kind == "conversations":
            known |= {"accepted", "tools"}
        for name in self.fields:
            _one_of("a key of data.fields", name, sorted(known))


@dataclass(frozen=True)
class ConversationsConfig:
    """Which turns of logged conversations are trained on, and how (data.kind=conversations)."""

    accepted_rule: str = "closing_turn"
    """Which answer the user was content with, where the log has no mark: closing_turn (the last assistant message
    before the last user turn, if that says thanks or goes on, and is neither a correction nor a repeat), marked (only
    marks count), or the dotted path of ``rule(messages) -> index or None``."""
    turns: str = "all"
    """all (also the accepted turn, with its own text as the hint) or before_accepted."""
    responses: str = "logged"
    """logged (the tokens of the log: nothing is sampled, no sampler is built) or sampled (a fresh rollout of each
    turn)."""
    min_log_prob: float | None = None
    """Logged turns whose mean log-prob per token under the student lies below this, in nats, are unlikely; null: none
    is."""
    unlikely: str = "drop"
    """What becomes of unlikely turns: drop (weight 0 in the loss) or down_weight (exp(mean - min_log_prob))."""
    show_contents: bool = False
    """Messages about bad records may quote the log, and metrics.show_samples shows turns of it."""

    def __post_init__(self) -> None:
        _tidy("conversations", self)
        _one_of("conversations.turns", self.turns, ["all", "before_accepted"])
        _one_of("conversations.responses", self.responses, ["logged", "sampled"])
        _one_of("conversations.unlikely", self.unlikely, ["drop", "down_weight"])
        _require(
            self.min_log_prob is None or self.min_log_prob <= 0,
            f"conversations.min_log_prob is a log-prob in nats, at most 0, got {self.min_log_prob}",
        )


@dataclass(frozen=True)
class SolutionsConfig:
    """The model's own verified responses as solutions (data.solutions=own)."""

    refresh_every: int = 50
    """Steps after which the coming steps' problems are solved anew, by the weights of that moment."""
    num_samples: int = 8
    """Responses per problem, drawn as rollout.* says, among which solutions are looked for."""
    keep: int = 2
    """Verified responses kept per problem; a step shows the teacher the best one that is not the response itself."""
    pick: str = "shortest"
    """Which of the verified ones are kept: shortest, most_likely (mean log-prob under the student), random, or
    learnable (the score of pipeline/score.py)."""
    alpha: float = 0.01
    """With pick=learnable: weight of the least likely token, and of the largest teacher-student log-ratio."""

    def __post_init__(self) -> None:
        _tidy("solutions", self)
        _at_least(1, "solutions", self, "refresh_every num_samples keep")
        _at_least(0, "solutions", self, "alpha")
        _one_of("solutions.pick", self.pick, ["shortest", "most_likely", "random", "learnable"])


@dataclass(frozen=True)
class RolloutConfig:
    """How the student writes its responses."""

    engine: str = "megatron"
    """The sampler: megatron (the training weights themselves, with a KV cache) or vllm."""
    placement: str = "colocated"
    """Where vLLM runs: colocated (in the trainer's own processes and on their devices) or server (in processes of its
    own, on other devices or nodes; the trainer then needs no vLLM)."""
    engine_tp: int = 1
    """Tensor-parallel size of a vLLM engine.  Colocated: so many consecutive ranks form one engine."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine by their own names, such as max_num_seqs; they override what is derived."""
    hf_config: str | None = None
    """Folder with the Hugging Face config.json that vLLM builds the model from; null takes the one that the checkpoint
    carries, else makes it from the model."""
    servers: list[str] = field(default_factory=list)
    """Addresses of vLLM servers that run already (`selfdistill serve`), http://host:port."""
    num_servers: int = 0
    """Servers that the run starts by itself on the node of rank 0, and ends."""
    server_python: str | None = None
    """The Python of the environment with vLLM, for the servers that the run starts; null is the trainer's own."""
    server_env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the servers that the run starts, such as NCCL_DEBUG; an empty value removes a variable.
    All others are those with which the run was started, without what the launcher or the run set for itself."""
    transfer: str | None = None
    """How weights reach servers: shared_memory (files in transfer_dir), gloo, nccl, or ipc (servers on the trainer's
    own GPUs); null: nccl on GPUs where all servers have the trainer's version of NCCL, else ipc where they see the
    trainer's GPU, else shared_memory, or gloo where not all workers can read those files."""
    transfer_dir: str = "/dev/shm"
    """Folder of the files of transfer=shared_memory; a shared file system where servers are on other nodes."""
    bucket_mb: float = 1024.0
    """Weights travel in buckets of this many MiB.  On their way to servers there are two: one is packed while the
    servers load the other."""
    timeout_s: float = 1200.0
    """A server that gives no sign of progress for so many seconds counts as dead; to be less than
    stop.hang_timeout_minutes, so that the other servers can write what it owed."""
    max_staleness: int = 0
    """Optimizer steps by which the weights that wrote a response may be older than the present ones."""
    guidance: str = "none"
    """none: the student writes alone; mixed: every token is drawn from the target itself, out of both contexts at once,
    by the student's present weights.  Such responses are off-policy for the student."""
    guide_below: float | None = None
    """With guidance=mixed: guide only problems whose recent success rate is below this (needs answers); null guides
    all."""
    num_samples: int = 1
    """Responses per problem and step."""
    max_new_tokens: int = 256
    """Longest response in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that hold this much probability."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response, besides the tokenizer's end-of-sequence token."""
    kv_cache_gb: float | None = None
    """Memory for the KV cache per rank; larger batches are split.  Null is a third of what is free: the
    splits, and with them the last bits of log-probs, then follow the memory that happens to be free; set a number
    where a resumed run must repeat every bit."""
    replay: str | None = None
    """A JSONL file of recorded responses (as written by ``rollout.record``) to train on instead of
    sampling."""
    record: str | None = None
    """Write every response, with its step, problem and sample index, to this JSONL file."""

    def __post_init__(self) -> None:
        _tidy("rollout", self)
        _one_of("rollout.engine", self.engine, ["megatron", "vllm"])
        _one_of("rollout.placement", self.placement, ["colocated", "server"])
        _one_of("rollout.guidance", self.guidance, ["none", "mixed"])
        if self.transfer is not None:
            _one_of("rollout.transfer", self.transfer, ["shared_memory", "gloo", "nccl", "ipc"])
        _at_least(1, "rollout", self, "num_samples max_new_tokens engine_tp")
        _at_least(0, "rollout", self, "temperature top_k kv_cache_gb num_servers max_staleness")
        _require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        for name in ("bucket_mb", "timeout_s"):
            value = getattr(self, name)
            _require(value > 0, f"rollout.{name} must be positive, got {value}")
        self._check_servers()
        self._check_guidance()

    def _check_servers(self) -> None:
        on_servers = self.engine == "vllm" and self.placement == "server"
        _require(
            on_servers or not (self.servers or self.num_servers),
            "rollout.servers and rollout.num_servers need rollout.engine=vllm and rollout.placement=server",
        )
        _require(
            not on_servers or bool(self.servers) != bool(self.num_servers),
            "rollout.placement=server needs either rollout.servers (addresses of servers that run) or "
            "rollout.num_servers (servers that the run starts)",
        )
        for address in self.servers:
            _require(
                address.startswith(("http://", "https://")),
                f"rollout.servers must hold addresses such as http://node7:8000, got {address!r}",
            )

    def _check_guidance(self) -> None:
        _require(
            self.guide_below is None or (self.guidance == "mixed" and 0 < self.guide_below <= 1),
            f"rollout.guide_below must lie in (0, 1] and needs rollout.guidance=mixed, got {self.guide_below} with "
            f"guidance={self.guidance}",
        )
        _require(
            self.guidance == "none" or (self.temperature in (0, 1) and self.top_k == 0 and self.top_p == 1),
            "rollout.guidance=mixed draws from the target itself: it needs rollout.temperature=1 (or 0), top_k=0 and "
            f"top_p=1, got {self.temperature}, {self.top_k} and {self.top_p}",
        )


@dataclass(frozen=True)
class TargetConfig:
    """The mixed target q = softmax((w * l_teacher + l_student) / k)."""

    rule: str = "entropy_matched"
    """How k is found: entropy_matched (per token), fixed, batch (one k per step), or teacher_alone (no
    mix)."""
    teacher_weight: float = 0.75
    """w, the weight of the teacher's logits; the student's weight is 1."""
    k_max: Any = "1 + w"
    """Upper bound of k: '1 + w', a number, or null (the strict match)."""
    k: float | None = None
    """k of the rule fixed; null is 1 + w."""

    def __post_init__(self) -> None:
        _tidy("target", self)
        _one_of("target.rule", self.rule, ["entropy_matched", "fixed", "batch", "teacher_alone"])
        _at_least(0, "target", self, "teacher_weight")
        number = isinstance(self.k_max, int | float) and not isinstance(self.k_max, bool)
        _require(
            self.k_max is None or self.k_max == "1 + w" or (number and self.k_max > 0),
            f"target.k_max must be '1 + w', a positive number or null, got {self.k_max!r}",
        )
        _require(self.k is None or self.k > 0, f"target.k must be positive or null, got {self.k}")


@dataclass(frozen=True)
class LossConfig:
    """The divergence between the target q and the student p, in nats per response token."""

    divergence: str = "reverse_kl"
    """reverse_kl = KL(p || q), forward_kl = KL(q || p), or jsd (generalised Jensen-Shannon)."""
    jsd_lambda: float = 0.5
    """The mixture weight of q in the generalised Jensen-Shannon divergence."""
    backend: str | None = None
    """torch, or triton (kernels for NVIDIA GPUs).  null: triton where the logits are on a GPU and triton is installed,
    else torch; the log says which and why."""
    rollout_correction: str = "none"
    """none, or truncated: each token's loss is weighted by min(p / mu, rollout_correction_cap), p the student's
    probability of the token and mu that of the distribution it was drawn from (another engine's, or the guided mix)."""
    rollout_correction_cap: float = 2.0
    """Largest importance weight."""
    fused: str | None = None
    """The output layer: none (all logits of a microbatch exist at once, student's and teacher's), or fused with the
    loss in chunks of tokens: keep_gradient (the gradient of the student's logits is kept until backward) or low_memory
    (backward makes the logits again: half as many GEMMs more).  Null: none if that stays within max_logits_gb, else
    keep_gradient if that does, else low_memory.  Where it is fused, own solutions are scored in such chunks, too.
    Self-distillation only; baselines are never fused."""
    fused_chunk_tokens: int = 4096
    """Response tokens of a chunk."""
    max_logits_gb: float | None = None
    """With fused=null: what the logits of the largest microbatch may take on a rank, in GiB; null: 1/20 of
    cluster.gpu_memory_gb."""

    def __post_init__(self) -> None:
        _tidy("loss", self)
        if self.backend is not None:
            _one_of("loss.backend", self.backend, ["torch", "triton"])
        if self.fused is not None:
            _one_of("loss.fused", self.fused, ["none", "keep_gradient", "low_memory"])
        _at_least(1, "loss", self, "fused_chunk_tokens")
        _at_least(0, "loss", self, "max_logits_gb")
        _one_of("loss.rollout_correction", self.rollout_correction, ["none", "truncated"])
        _require(
            self.rollout_correction_cap > 0,
            f"loss.rollout_correction_cap must be positive, got {self.rollout_correction_cap}",
        )
        _one_of("loss.divergence", self.divergence, ["reverse_kl", "forward_kl", "jsd"])
        _require(0 < self.jsd_lambda < 1, f"loss.jsd_lambda must lie in (0, 1), got {self.jsd_lambda}")


@dataclass(frozen=True)
class TeacherConfig:
    """Which weights read the response next to the solution."""

    weights: str = "frozen"
    """frozen (those at the start of the run), ema (their moving average) or current (the student's own)."""
    ema_decay: float = 0.99
    """Decay per optimizer step of the moving average."""
    offload: str = "none"
    """none, or cpu: the teacher's weights rest in host memory between steps."""

    def __post_init__(self) -> None:
        _tidy("teacher", self)
        _one_of("teacher.weights", self.weights, ["frozen", "ema", "current"])
        _one_of("teacher.offload", self.offload, ["none", "cpu"])
        _require(0 <= self.ema_decay < 1, f"teacher.ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class ScheduleConfig:
    """How one step runs through the pipeline."""

    pair_order: str | None = None
    """teacher_first, alternating, or null: teacher_first with pipelining, else alternating."""
    max_tokens: int = 8192
    """Token budget of a microbatch: sequences are packed into rows of at most this length."""
    teacher_store_gb: float = 4.0
    """The teacher's hidden rows stay on the device up to this size per rank, and go to pinned host memory
    above it."""
    recompute_granularity: str | None = None
    """Activation recomputation: null, selective or full."""
    recompute_method: str | None = None
    """With full recomputation: uniform or block."""
    recompute_num_layers: int | None = None
    """With full recomputation: layers per unit."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective recomputation: Megatron's module names."""

    def __post_init__(self) -> None:
        _tidy("schedule", self)
        if self.pair_order is not None:
            _one_of("schedule.pair_order", self.pair_order, ["teacher_first", "alternating"])
        _at_least(1, "schedule", self, "max_tokens recompute_num_layers")
        _at_least(0, "schedule", self, "teacher_store_gb")
        if self.recompute_granularity is not None:
            _one_of("schedule.recompute_granularity", self.recompute_granularity, ["selective", "full"])


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's optimizer, learning-rate schedule and data-parallel reduction."""

    optimizer: str = "adam"
    """adam or sgd."""
    precision: str = "bf16"
    """bf16 (with float32 main parameters) or fp32."""
    lr: float = 1e-6
    """Learning rate after warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Steps until min_lr; null is num_steps."""
    lr_decay_style: str = "constant"
    """constant, linear, cosine or inverse-square-root."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    sgd_momentum: float = 0.0
    """Momentum of SGD."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 is no clipping."""
    use_distributed_optimizer: bool = True
    """Cut optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while backward runs."""
    overlap_param_gather: bool = False
    """Gather parameters bucket by bucket while forward runs (distributed optimizer only)."""

    def __post_init__(self) -> None:
        _tidy("optimizer", self)
        _one_of("optimizer.optimizer", self.optimizer, ["adam", "sgd"])
        _one_of("optimizer.precision", self.precision, ["bf16", "fp32"])
        styles = ["constant", "linear", "cosine", "inverse-square-root"]
        _one_of("optimizer.lr_decay_style", self.lr_decay_style, styles)
        _at_least(0, "optimizer", self, "lr min_lr lr_warmup_steps weight_decay adam_eps sgd_momentum clip_grad")
        _at_least(1, "optimizer", self, "lr_decay_steps")
        _require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr ({self.min_lr}) must not be above optimizer.lr ({self.lr}), from which it decays",
        )
        for name in ("adam_beta1", "adam_beta2"):
            beta = getattr(self, name)
            _require(0 <= beta < 1, f"optimizer.{name} must lie in [0, 1), got {beta}")
        _require(
            self.optimizer != "sgd" or not self.use_distributed_optimizer,
            "optimizer.optimizer=sgd needs optimizer.use_distributed_optimizer=false: Megatron's distributed optimizer "
            "is Adam's",
        )
        _require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "optimizer.overlap_param_gather=true needs use_distributed_optimizer and overlap_grad_reduce",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is read at the start and written during a run."""

    load: str | None = None
    """A Megatron checkpoint (torch_dist or legacy) whose weights the run starts from; null starts from random weights.
    Its stored arguments give the architecture: what model.* says besides must not contradict them."""
    load_optimizer: bool = False
    """Take over its optimizer state too (torch_dist, the same kind of optimizer)."""
    verify: str = "checksums"
    """What is compared with a checkpoint's manifest before it is loaded: checksums (reads every file once, spread over
    the ranks), sizes, or none.  With none, a checkpoint of this program that has lost its manifest is loaded, too; it
    is refused otherwise.  Checkpoints of other programs have no manifest."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int | None = 2
    """Checkpoints that are kept; null keeps all."""
    async_save: bool = False
    """Write in the background while training goes on."""
    resume: Any = True
    """true: continue from the newest checkpoint in the run folder, if there is one, unless a key that decides what the
    run learns has another value than when it was saved; such keys are named.  force: continue all the same, with the
    stored weights, optimizer and teacher and the present configuration.  false: refuse a folder with checkpoints."""

    def __post_init__(self) -> None:
        _tidy("checkpoint", self)
        _one_of("checkpoint.verify", self.verify, ["checksums", "sizes", "none"])
        _require(
            self.resume in (True, False, "force"),
            f"checkpoint.resume must be one of true, false, force, got {self.resume!r}",
        )
        _at_least(0, "checkpoint", self, "save_every")
        _at_least(1, "checkpoint", self, "keep_last")


@dataclass(frozen=True)
class MetricsConfig:
    """Where the numbers and some responses of a step go.  Numbers are always written to metrics.jsonl in the run
    folder."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    console: bool = True
    """Progress bar and a line every ``console_every`` steps."""
    console_every: int = 1
    """Steps between console lines."""
    show_samples: int = 2
    """Responses that are shown as text, each token marked by how much the teacher disagrees: on the console, in
    TensorBoard, and whole in samples.jsonl in the run folder; the first of so many problems; 0 is none.  Of
    conversations only with conversations.show_contents=true."""
    show_samples_every: int = 10
    """Steps between samples; those of the first step are always shown."""

    def __post_init__(self) -> None:
        _tidy("metrics", self)
        _at_least(1, "metrics", self, "console_every show_samples_every")
        _at_least(0, "metrics", self, "show_samples")

    def samples_due(self, step: int) -> bool:
        """Return whether samples of this step, counted from 1, are to be shown."""
        return self.show_samples > 0 and (step == 1 or step % self.show_samples_every == 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out problems, without hints."""

    path: str | None = None
    """Problems with answers, in any of the forms that data.path takes; null is no evaluation."""
    split: str = "test"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set; null is its default one."""
    every: int = 0
    """Steps between evaluations; 0 is never."""
    at_start: bool = False
    """Also evaluate before the first step."""
    limit: int | None = None
    """Use only the first so many problems."""
    num_samples: int = 1
    """Samples per problem at rollout.temperature, besides one greedy response."""
    pass_at_k: list[int] = field(default_factory=lambda: [1])
    """Values of k for pass@k; none may exceed num_samples."""
    verifier: str = "math_verify"
    """math_verify (the response means the answer), exact_match (its final answer is the answer, letter by letter), or
    the dotted path of ``verify(response_text, problem) -> bool``."""

    def __post_init__(self) -> None:
        _tidy("evaluation", self)
        _at_least(0, "evaluation", self, "every num_samples")
        _at_least(1, "evaluation", self, "limit")
        _require(
            min(self.pass_at_k, default=1) >= 1,
            f"evaluation.pass_at_k must hold numbers of at least 1, got {self.pass_at_k}",
        )
        worst = max(self.pass_at_k, default=0)
        _require(
            worst <= max(self.num_samples, 1),
            f"evaluation.pass_at_k asks for pass@{worst} but evaluation.num_samples is {self.num_samples}",
        )


@dataclass(frozen=True)
class GuardsConfig:
    """When a run is unhealthy.  A guard stops the run with a sentence and a checkpoint; null turns it off."""

    identity_tolerance: float | None = 1e-4
    """At the start, one prompt read twice by the same weights must give a loss below this, in nats per
    token."""
    max_teacher_cross_entropy: float | None = None
    """At the start, the teacher's cross-entropy on the first responses must lie below this, in nats per
    token."""
    non_finite: bool = True
    """Stop at a loss or gradient norm that is NaN or infinite; the step is not applied."""
    reference_steps: int = 5
    """The first steps, whose means are the reference of the guards below."""
    patience: int = 3
    """Consecutive steps that must violate a guard before it stops the run."""
    min_entropy_ratio: float | None = 0.02
    """Stop when the student's entropy falls below this share of its reference."""
    max_entropy_ratio: float | None = 3.0
    """Stop when the student's entropy rises above this multiple of its reference."""
    min_entropy_rise: float = 0.05
    """The entropy must also have risen by this many nats per token, so that a tiny reference raises no
    alarm."""
    min_length_ratio: float | None = 0.25
    """Stop when the mean response length falls below this share of its reference."""

    def __post_init__(self) -> None:
        _tidy("guards", self)
        _at_least(1, "guards", self, "reference_steps patience")


@dataclass(frozen=True)
class StopConfig:
    """When a run ends before its last step, besides SIGUSR1 and SIGTERM: with a checkpoint to go on from."""

    time_limit_minutes: float | None = None
    """The run ends by itself within so many minutes of its start; null: before its Slurm job ends, where it is one."""
    margin_minutes: float = 3.0
    """Of this time, what is kept for the last checkpoint, besides the longest step so far."""
    hang_timeout_minutes: float | None = None
    """Where no rank makes progress for so long, every rank's stack is written to run_dir/stacks, the one that hangs is
    named, and the run ends (exit status 5); null: 5/6 of parallel.distributed_timeout_minutes; 0: never."""

    def __post_init__(self) -> None:
        _tidy("stop", self)
        _at_least(0, "stop", self, "time_limit_minutes margin_minutes hang_timeout_minutes")


@dataclass(frozen=True)
class Config:
    """Everything that a run is."""

    run_dir: str = ""
    """The run folder: checkpoints, teacher, metrics, resolved configuration.  A run needs it; there is no default."""
    num_steps: int = 100
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of data order, sampling streams and initial weights."""
    objective: str = "self_distillation"
    """self_distillation; or a baseline on the same data: sft (next-token training on the solution text)
    or rft (next-token training on own responses whose answer verifies)."""
    dry_run: bool = False
    """Check and stop.  Under a launch: after everything has been built, before the first step.  Without one, and with
    cluster.num_gpus: every rank's part as shapes alone, memory and bubble, on any machine and without GPUs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What the model is."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is cut."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """What it runs on."""
    data: DataConfig = field(default_factory=DataConfig)
    """Problems and prompts."""
    conversations: ConversationsConfig = field(default_factory=ConversationsConfig)
    """Chat logs."""
    solutions: SolutionsConfig = field(default_factory=SolutionsConfig)
    """Own solutions."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What the student is trained towards."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How the distance to it is measured."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Which weights teach."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How a step runs through the pipeline."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights are updated."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is read and written."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where numbers go."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out problems."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """When a run is unhealthy."""
    stop: StopConfig = field(default_factory=StopConfig)
    """When a run ends before its last step."""
    from_environment: Mapping[Place, FromEnvironment] = field(
        default_factory=dict, repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )
    """Not a key: the values above that were read from the environment, and how they were written."""

    def __post_init__(self) -> None:
        _tidy("", self)
        _one_of("objective", self.objective, ["self_distillation", "sft", "rft"])
        _require(self.num_steps >= 1, f"num_steps must be at least 1, got {self.num_steps}")
        _require(0 <= self.seed <= MAX_SEED, f"seed must lie in 0 to {MAX_SEED}, got {self.seed}")
        if self.data.kind == "conversations":
            self._check_conversations()
        if self.loss.rollout_correction != "none":
            self._check_correction()
        _require(
            self.objective == "self_distillation" or self.loss.fused in (None, "none"),
            f"loss.fused={self.loss.fused} fuses the output layer with the distillation loss, but objective="
            f"{self.objective} trains on next tokens: set loss.fused=none, or null",
        )
        hang, collective = self.stop.hang_timeout_minutes, self.parallel.distributed_timeout_minutes
        _require(
            hang is None or hang < collective,
            f"stop.hang_timeout_minutes ({hang}) must be below parallel.distributed_timeout_minutes ({collective}), "
            "after which a rank that waits gives up and takes the others with it: raise the latter",
        )
        _require(
            self.data.solutions == "given" or self.objective != "sft",
            "objective=sft trains on the text of given solutions: leave data.solutions=given",
        )
        _require(
            self.rollout.guidance == "none" or self.rollout.replay is None,
            "rollout.guidance=mixed says how responses are sampled, rollout.replay takes them from a file: unset one",
        )

    @property
    def logged(self) -> bool:
        """The responses are those of a log: nobody samples."""
        return self.data.kind == "conversations" and self.conversations.responses == "logged"

    @property
    def samples(self) -> bool:
        """Something is sampled: responses, or beside those of a log, answers to held-out problems."""
        evaluates = self.evaluation.path is not None and (self.evaluation.every or self.evaluation.at_start)
        return not self.logged or bool(evaluates)

    @property
    def shows_contents(self) -> bool:
        """Problems and responses may be shown as text: those of conversations only where the user says so."""
        return self.data.kind != "conversations" or self.conversations.show_contents

    def _check_conversations(self) -> None:
        _require(
            self.objective == "self_distillation" and self.data.solutions == "given",
            "data.kind=conversations needs objective=self_distillation and data.solutions=given, got "
            f"{self.objective} and {self.data.solutions}",
        )
        sampled = self.rollout.guidance != "none" or self.rollout.replay or self.rollout.record
        _require(
            not (self.logged and (sampled or self.loss.rollout_correction != "none")),
            "conversations.responses=logged samples nothing: unset rollout.guidance, rollout.replay, rollout.record "
            "and loss.rollout_correction, or set conversations.responses=sampled",
        )
        _require(
            self.logged or self.conversations.min_log_prob is None,
            "conversations.min_log_prob is about logged turns: unset it, or set conversations.responses=logged",
        )

    @property
    def hang_timeout_s(self) -> float | None:
        """``stop.hang_timeout_minutes`` in seconds, its default worked out; None is never."""
        minutes = self.stop.hang_timeout_minutes
        minutes = self.parallel.distributed_timeout_minutes * 5 / 6 if minutes is None else minutes
        return minutes * 60 or None

    def _check_correction(self) -> None:
        rollout, key = self.rollout, f"loss.rollout_correction={self.loss.rollout_correction}"
        _require(self.objective != "sft", f"{key} corrects samples, but with objective=sft nobody samples")
        _require(
            rollout.temperature > 0,
            f"{key} divides by the probability of a draw, which greedy decoding (rollout.temperature=0) does not have",
        )
        plain = rollout.temperature == 1 and rollout.top_k == 0 and rollout.top_p == 1
        _require(
            rollout.engine != "vllm" or plain,
            f"{key} needs the log-prob of what was sampled, and vLLM tells log-probs at temperature 1 only: set "
            f"rollout.temperature=1, top_k=0 and top_p=1, got {rollout.temperature}, {rollout.top_k}, {rollout.top_p}",
        )

    def check_ranks(self, world_size: int) -> None:
        """Raise `ConfigError` where ``world_size`` ranks cannot be cut into the parallel sizes, or the batch is smaller
        than the number of replicas, whatever the model is."""
        p = self.parallel
        tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
        ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size or tp
        model_size = tp * pp * cp
        made_for = self.cluster.num_gpus
        _require(
            made_for is None or made_for == world_size,
            f"cluster.num_gpus is {made_for}, but the launch has {world_size} ranks: launch {made_for}, or set "
            f"cluster.num_gpus={world_size} and see what dry_run=true says",
        )
        _require(
            world_size % model_size == 0,
            f"the world size {world_size} must be a multiple of TP x PP x CP = {tp} x {pp} x {cp} = {model_size}",
        )
        _require(
            world_size % (etp * pp * ep) == 0,
            f"the world size {world_size} must be a multiple of ETP x EP x PP = {etp} x {ep} x {pp} = {etp * ep * pp}",
        )
        dp = world_size // model_size
        _require(
            self.data.global_batch_size >= dp,
            f"data.global_batch_size ({self.data.global_batch_size}) must be at least the number of "
            f"data-parallel ranks ({dp})",
        )

    def check_world(self, world_size: int) -> None:
        """Raise `ConfigError` where the parallel sizes, the model and the batch cannot be cut for ``world_size``
        ranks."""
        self.check_ranks(world_size)
        p, m = self.parallel, self.model
        ep = p.expert_model_parallel_size
        _require(
            ep == 1 or m.num_moe_experts is not None or m.provider is not None,
            f"parallel.expert_model_parallel_size={ep} needs a mixture of experts (model.num_moe_experts)",
        )
        if m.provider is None:
            self._check_model_divides(p.tensor_model_parallel_size, p.pipeline_model_parallel_size, ep)

    def _check_model_divides(self, tp: int, pp: int, ep: int) -> None:
        p, m = self.parallel, self.model
        ffn = m.ffn_hidden_size or 4 * m.hidden_size
        for name, size in [
            ("model.hidden_size", m.hidden_size),
            ("model.num_attention_heads", m.num_attention_heads),
            ("model.num_query_groups", m.num_query_groups or m.num_attention_heads),
            ("model.ffn_hidden_size", ffn),
        ]:
            _require(size % tp == 0, f"{name} ({size}) must be a multiple of tensor_model_parallel_size ({tp})")
        chunks = pp * (p.virtual_pipeline_model_parallel_size or 1)
        uneven = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}
        if not uneven & set(m.transformer) and "pipeline_model_parallel_layout" not in m.transformer:
            _require(
                m.num_layers % chunks == 0,
                f"model.num_layers ({m.num_layers}) must be a multiple of PP x VPP = {chunks}, "
                "or give model.transformer.num_layers_in_first_pipeline_stage / ..._last_...",
            )
        if m.num_moe_experts is not None:
            _require(
                m.num_moe_experts % ep == 0,
                f"model.num_moe_experts ({m.num_moe_experts}) must be a multiple of EP ({ep})",
            )
            etp = p.expert_tensor_parallel_size or tp
            expert_ffn = m.moe_ffn_hidden_size or ffn
            _require(
                expert_ffn % etp == 0,
                f"model.moe_ffn_hidden_size ({expert_ffn}) must be a multiple of the tensor parallelism "
                f"inside an expert ({etp}): set parallel.expert_tensor_parallel_size",
            )
            _require(
                tp == 1 or p.sequence_parallel,
                "a mixture of experts with tensor parallelism needs parallel.sequence_parallel=true",
            )
