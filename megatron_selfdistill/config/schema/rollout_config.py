# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section rollout: how responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.choices import ENGINES, GUIDANCES, PLACEMENTS, TRANSFERS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


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
        normalise("rollout", self)
        one_of("rollout.engine", self.engine, ENGINES)
        one_of("rollout.placement", self.placement, PLACEMENTS)
        one_of("rollout.guidance", self.guidance, GUIDANCES)
        if self.transfer is not None:
            one_of("rollout.transfer", self.transfer, TRANSFERS)
        at_least(1, "rollout", self, "num_samples max_new_tokens engine_tp")
        at_least(0, "rollout", self, "temperature top_k kv_cache_gb num_servers max_staleness")
        require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        for name in ("bucket_mb", "timeout_s"):
            value = getattr(self, name)
            require(value > 0, f"rollout.{name} must be positive, got {value}")
        self._check_servers()
        self._check_guidance()

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
            require(
                address.startswith(("http://", "https://")),
                f"rollout.servers must hold addresses such as http://node7:8000, got {address!r}",
            )

    def _check_guidance(self) -> None:
        require(
            self.guide_below is None or (self.guidance == "mixed" and 0 < self.guide_below <= 1),
            f"rollout.guide_below must lie in (0, 1] and needs rollout.guidance=mixed, got {self.guide_below} with "
            f"guidance={self.guidance}",
        )
        require(
            self.guidance == "none" or (self.temperature in (0, 1) and self.top_k == 0 and self.top_p == 1),
            "rollout.guidance=mixed draws from the target itself: it needs rollout.temperature=1 (or 0), top_k=0 and "
            f"top_p=1, got {self.temperature}, {self.top_k} and {self.top_p}",
        )
