# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``rollout`` of the schema: how responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.choices import (
    ENGINES,
    GUIDANCES,
    OVERLAPS,
    PLACEMENTS,
    ROLLOUT_VIEWS,
    SELECTIONS,
    TRANSFERS,
    UPDATE_MODES,
)
from megatron_selfdistill.config.schema.field_checks import (
    at_least,
    is_dotted,
    normalise,
    one_of,
    one_of_or_dotted,
    require,
    require_address,
)


@dataclass(frozen=True)
class RolloutConfig:
    """The sampling of the student's responses."""

    engine: str = "megatron"
    """The sampler: megatron (the model in training itself, with a KV cache) or vllm."""
    placement: str = "colocated"
    """The place where vLLM runs: colocated (in the processes of the trainer, on the same devices) or server (in its own
    processes, on other devices or nodes; the trainer's environment then needs no vLLM)."""
    engine_tp: int = 1
    """Tensor-parallel size of a vLLM engine.  With placement=colocated this number of consecutive ranks forms one
    engine."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine by their own names, such as max_num_seqs; they override the values that this
    project derives."""
    hf_config: str | None = None
    """Directory with the Hugging Face config.json from which vLLM builds the model; null takes the config.json in the
    checkpoint, or derives it from the model where the checkpoint has none."""
    servers: list[str] = field(default_factory=list)
    """Addresses of vLLM servers that run already (`selfdistill serve`), such as http://host:port."""
    num_servers: int = 0
    """Number of servers that the run itself starts on the node of rank 0, and ends."""
    server_python: str | None = None
    """Python of the environment with vLLM, for the servers that the run starts; null is the trainer's Python."""
    server_env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the servers that the run starts, such as NCCL_DEBUG; an empty value removes a variable.
    The servers also get the environment in which the run was started, without the variables that the launcher or the
    run has set for itself."""
    transfer: str | None = None
    """The transfer of weights to servers: shared_memory (files in transfer_dir), gloo, nccl, or ipc (servers on the
    trainer's GPUs).  Null takes nccl on GPUs where all servers have the trainer's version of NCCL, otherwise ipc where
    the servers see the trainer's GPU, otherwise shared_memory where all workers can read files in transfer_dir,
    otherwise gloo."""
    transfer_dir: str = "/dev/shm"
    """Directory of the files of transfer=shared_memory, on a shared file system where servers are on other nodes."""
    bucket_mb: float = 1024.0
    """Size of the buckets in which weights travel, in MiB.  On the way to servers there are two buckets: one is packed
    while the servers load the other."""
    timeout_s: float = 1200.0
    """Seconds without a sign of progress after which a server counts as dead.  The time must be less than
    stop.hang_timeout_minutes, so that the other servers can sample the responses that are missing."""
    max_staleness: int = 0
    """Number of optimizer steps by which the oldest weights that sampled a token of a response may be older than the
    weights that the step trains."""
    overlap: str = "none"
    """The way in which generation and training share the time of a step: none (the step trains once it has all
    responses) or stream (the step trains on finished responses while servers generate the others, with the same weights
    and the same gradient; needs placement=server)."""
    wave_microbatches: int | None = None
    """Number of full student microbatches per replica from which finished responses are trained on under
    overlap=stream, while others are missing; null is the number of pipeline stages."""
    ahead: int = 0
    """Number of steps by which servers work ahead: while the trainer trains on the responses of a step, they generate
    those of this many further steps, with weights that are up to as many steps old when the trainer trains on them
    (needs placement=server, and max_staleness of at least ahead)."""
    at_update: str = "wait"
    """The fate of responses under way when servers get new weights, under ahead: wait (the update waits until they are
    finished) or keep (they go on with the new weights)."""
    extra_problems: int = 0
    """Number of problems beyond data.global_batch_size whose responses are under way: a step trains on the problems
    that are finished first, and the others go on in the next step with their tokens kept (needs an engine on the
    trainer's devices, and max_staleness * data.global_batch_size of at least extra_problems)."""
    round_tokens: int | None = None
    """Number of tokens that each response gets under extra_problems before the step looks whether it has enough
    finished problems, a divisor of max_new_tokens; null is about an eighth of max_new_tokens."""
    view: str = "plain"
    """The prompt that responses are sampled after: plain (the student's) or privileged (the teacher's, which shows the
    hint: the responses are then the teacher's own, off-policy for the student)."""
    select: str = "none"
    """The selection among the responses of a step: none, balance (as many right as wrong responses to each problem
    that has both, by dropping at random), verbal (a response to which the teacher gives a score below
    verbal.threshold is replaced by one that is sampled after the teacher's prompt), confidence (responses, and
    the solution in the teacher's prompt, end in a line "Confidence: P" with the share P of right responses to the
    problem, in place of the confidence that they state) or the dotted path of a function ``select(problem,
    responses)``, which gets the text and the reward of each response to the problem and returns for each its text,
    another text, or None to drop it."""
    guidance: str = "none"
    """The model that chooses the tokens: none (the student alone) or mixed (each token is sampled from the target
    itself, from all its contexts at once, by the present weights and, with target.anchor=reference, by those of teacher
    and reference, which needs engine=megatron or adapters; such responses are off-policy for the student)."""
    guide_below: float | None = None
    """The recent success rate below which guidance=mixed guides a problem, which needs answers; every fourth visit to
    such a problem samples without guidance, to know its rate.  Null guides all problems."""
    num_samples: int = 1
    """Number of responses per problem and step."""
    max_new_tokens: int = 256
    """Length of the longest response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Number of most likely tokens among which a token is sampled; 0 is all tokens."""
    top_p: float = 1.0
    """Probability of the most likely tokens among which a token is sampled; 1 is all tokens."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Ids of tokens that end a response, besides the tokenizer's end-of-sequence token."""
    kv_cache_gb: float | None = None
    """Memory for the KV cache, in GiB per rank; larger batches are split.  Null is a third of the free memory: the
    splits, and with them the last bits of log-probs, then depend on the memory that happens to be free.  Set a number
    where a resumed run must repeat every bit."""
    replay: str | None = None
    """JSONL file of responses, as rollout.record writes it; the run trains on these responses instead of sampling."""
    record: str | None = None
    """JSONL file to which the run writes every response with its step, problem and index of the sample; null is
    none."""

    def __post_init__(self) -> None:
        normalise("rollout", self)
        one_of("rollout.engine", self.engine, ENGINES)
        one_of("rollout.placement", self.placement, PLACEMENTS)
        one_of("rollout.guidance", self.guidance, GUIDANCES)
        one_of("rollout.overlap", self.overlap, OVERLAPS)
        one_of("rollout.at_update", self.at_update, UPDATE_MODES)
        one_of("rollout.view", self.view, ROLLOUT_VIEWS)
        one_of_or_dotted("rollout.select", self.select, SELECTIONS)
        if self.transfer is not None:
            one_of("rollout.transfer", self.transfer, TRANSFERS)
        at_least(1, "rollout", self, "num_samples max_new_tokens engine_tp wave_microbatches round_tokens")
        at_least(0, "rollout", self, "temperature top_k kv_cache_gb num_servers max_staleness ahead extra_problems")
        require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        for name in ("bucket_mb", "timeout_s"):
            value = getattr(self, name)
            require(value > 0, f"rollout.{name} must be positive, got {value}")
        self._check_servers()
        self._check_guidance()

    @property
    def tokens_per_round(self) -> int:
        """The value of ``round_tokens``, or the least divisor of ``max_new_tokens`` that is an eighth of it or more."""
        if self.round_tokens is not None:
            return self.round_tokens
        return next(
            n for n in range(-(-self.max_new_tokens // 8), self.max_new_tokens + 1) if self.max_new_tokens % n == 0
        )

    @property
    def selects_by_function(self) -> bool:
        """Whether the user's function selects among the responses of a step."""
        return is_dotted(self.select)

    def _check_servers(self) -> None:
        on_servers = self.engine == "vllm" and self.placement == "server"
        require(
            on_servers or not (self.servers or self.num_servers),
            "rollout.servers and rollout.num_servers need rollout.engine=vllm and rollout.placement=server",
        )
        require(
            not on_servers or bool(self.servers) != bool(self.num_servers),
            "rollout.placement=server needs either rollout.servers (addresses of servers that run) or "
            "rollout.num_servers (servers that the run starts)",
        )
        for address in self.servers:
            require_address("rollout.servers", address, "http://node7:8000")

    def _check_guidance(self) -> None:
        require(
            self.view == "plain" or self.guidance == "none",
            "rollout.view=privileged samples after the teacher's prompt alone, and rollout.guidance=mixed after both: "
            "set one of them back",
        )
        require(
            self.guide_below is None or (self.guidance == "mixed" and 0 < self.guide_below <= 1),
            f"rollout.guide_below must lie in (0, 1] and needs rollout.guidance=mixed, got {self.guide_below} with "
            f"guidance={self.guidance}",
        )
        require(
            self.guidance == "none" or (self.temperature in (0, 1) and self.top_k == 0 and self.top_p == 1),
            "rollout.guidance=mixed samples from the target itself: it needs rollout.temperature=1 (or 0), top_k=0 and "
            f"top_p=1, got {self.temperature}, {self.top_k} and {self.top_p}",
        )
