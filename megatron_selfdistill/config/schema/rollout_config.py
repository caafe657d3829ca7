# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``rollout`` of the schema: how responses are sampled.

`check_ahead` has the rules for responses that are generated ahead of their step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_selfdistill.choices import ENGINES, GUIDANCES, PLACEMENTS, TRANSFERS, UPDATE_MODES
from megatron_selfdistill.config.schema.data_config import EnvironmentConfig
from megatron_selfdistill.config.schema.field_checks import check_fields, require, require_address
from megatron_selfdistill.config.schema.method_config import GIVEN, Needs
from megatron_selfdistill.config.schema.ranges import (
    MAX_WAIT,
    DifferentEntries,
    Directory,
    FilePath,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Ranks,
    Text,
    above,
    at_least,
    at_most,
)

_MIN_TEMPERATURE = 0.01  # vLLM's


@dataclass(frozen=True)
class RolloutConfig:
    """The sampling of the student's responses."""

    engine: Annotated[str, OneOf(ENGINES)] = "megatron"
    """The sampler: megatron (the model in training itself, with a KV cache) or vllm."""
    placement: Annotated[str, OneOf(PLACEMENTS)] = "colocated"
    """The place where vLLM runs: colocated (in the processes of the trainer, on the same devices) or server (in its own
    processes, on other devices or nodes; the trainer's environment then needs no vLLM)."""
    engine_tp: Ranks = 1
    """Tensor-parallel size of a vLLM engine.  With placement=colocated this number of consecutive ranks forms one
    engine."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine by their own names, such as max_num_seqs; they override the values that this
    project derives."""
    hf_config: FilePath | None = None
    """Directory with the Hugging Face config.json from which vLLM builds the model; null takes the config.json in the
    checkpoint, or derives it from the model where the checkpoint has none."""
    servers: Annotated[list[Name], DifferentEntries()] = field(default_factory=list)
    """Addresses of vLLM servers that run already (`selfdistill serve`), such as http://host:port."""
    num_servers: Annotated[int, at_least(0), at_most(1024)] = 0
    """Number of servers that the run itself starts on the node of rank 0, and ends."""
    server_python: FilePath | None = None
    """Python of the environment with vLLM, for the servers that the run starts; null is the trainer's Python."""
    server_env: dict[str, Text] = field(default_factory=dict)
    """Environment variables of the servers that the run starts, such as NCCL_DEBUG; an empty value removes a variable.
    The servers also get the environment in which the run was started, without the variables that the launcher or the
    run has set for itself."""
    transfer: Annotated[str, OneOf(TRANSFERS)] | None = None
    """The transfer of weights to servers: shared_memory (files in transfer_dir), gloo, nccl, or ipc (servers on the
    trainer's GPUs).  Null takes nccl on GPUs where all servers have the trainer's version of NCCL, otherwise ipc where
    the servers see the trainer's GPU, otherwise shared_memory where all workers can read files in transfer_dir,
    otherwise gloo."""
    transfer_dir: Directory = "/dev/shm"
    """Directory of the files of transfer=shared_memory, on a shared file system where servers are on other nodes."""
    bucket_mb: PositiveFloat = 1024.0
    """Size of the buckets in which weights travel, in MiB.  On the way to servers there are two buckets: one is packed
    while the servers load the other."""
    timeout_s: Annotated[float, above(0), at_most(MAX_WAIT)] = 1200.0
    """Seconds without a sign of progress after which a server counts as dead.  The time must be less than
    stop.hang_timeout_minutes, so that the other servers can sample the responses that are missing."""
    max_staleness: NonNegativeInt = 0
    """Number of optimizer steps by which the oldest weights that sampled a token of a response may be older than the
    weights that the step trains."""
    ahead: NonNegativeInt = 0
    """Number of steps by which servers work ahead: while the trainer trains on the responses of a step, they generate
    those of this many further steps.  Their weights are up to as many steps old when the trainer trains on them.  Needs
    placement=server, and max_staleness of at least ahead."""
    at_update: Annotated[str, OneOf(UPDATE_MODES)] = "wait"
    """The fate of responses under way when servers get new weights, under ahead: wait (the update waits until they are
    finished) or keep (they go on with the new weights)."""
    guidance: Annotated[str, OneOf(GUIDANCES)] = "none"
    """The model that chooses the tokens: none (the student alone) or mixed (each token is sampled from the target
    itself, from all its contexts at once; needs engine=megatron).  Mixed responses are off-policy for the student."""
    guide_below: Annotated[float, above(0), at_most(1)] | None = None
    """The recent success rate below which guidance=mixed guides a problem, which needs answers; every fourth visit to
    such a problem samples without guidance, to know its rate.  Null guides all problems."""
    num_samples: PositiveInt = 1
    """Number of responses per problem and step."""
    max_new_tokens: PositiveInt = 256
    """Length of the longest response, in tokens."""
    temperature: Annotated[float, at_least(0), at_most(100)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_k: NonNegativeInt = 0
    """Number of most likely tokens among which a token is sampled; 0 is all tokens."""
    top_p: Annotated[float, above(0), at_most(1)] = 1.0
    """Probability of the most likely tokens among which a token is sampled; 1 is all tokens."""
    stop_token_ids: list[NonNegativeInt] = field(default_factory=list)
    """Ids of tokens that end a response, besides those of the tokenizer, generation_config.json and config.json."""
    ids_without_token: bool = False
    """Whether a sampler may choose an id for which the model has a row and the tokenizer no token, as in Qwen's models.
    Such an id has no text."""
    kv_cache_gb: NonNegativeFloat | None = None
    """Memory for the KV cache, in GiB per rank; larger batches are split.  Null is a third of the free memory: the
    splits, and with them the last bits of log-probs, then depend on the memory that happens to be free.  Set a number
    where a resumed run must repeat every bit."""
    replay: FilePath | None = None
    """JSONL file of responses, as rollout.record writes it; the run trains on these responses instead of sampling."""
    record: FilePath | None = None
    """JSONL file to which the run writes every response with its step, problem and index of the sample; null is
    none."""

    def __post_init__(self) -> None:
        check_fields("rollout", self)
        require(
            self.temperature == 0 or self.temperature >= _MIN_TEMPERATURE,
            f"rollout.temperature must be 0 (greedy) or at least {_MIN_TEMPERATURE}, got {self.temperature}",
        )
        self._check_servers()
        self._check_guidance()

    @property
    def is_colocated(self) -> bool:
        """Whether vLLM engines sample in the trainer's own processes, on the trainer's devices."""
        return self.engine == "vllm" and self.placement == "colocated"

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
            self.guidance == "none" or (self.temperature in (0, 1) and self.top_k == 0 and self.top_p == 1),
            "rollout.guidance=mixed samples from the target itself: it needs rollout.temperature=1 (or 0), top_k=0 and "
            f"top_p=1, got {self.temperature}, {self.top_k} and {self.top_p}",
        )
        require(
            self.guidance == "none" or self.engine != "vllm",
            "rollout.guidance=mixed with rollout.engine=vllm is not possible, since guided rollouts are sampled in "
            "process: set rollout.engine=megatron without vLLM servers, or rollout.guidance=none",
        )


def check_ahead(
    method: str, needs: Needs, rollout: RolloutConfig, environment: EnvironmentConfig, *, samples_responses: bool
) -> None:
    """Raise ValueError where servers cannot generate the responses of later steps.

    ``method``: the name of the method.  ``samples_responses``: whether it samples the responses that it trains on.
    """
    if not rollout.ahead:
        return
    mode = f"rollout.ahead={rollout.ahead}"
    require(
        samples_responses and rollout.replay is None,
        f"{mode} trains on responses while others are being sampled, but this run samples none: set rollout.ahead=0",
    )
    require(
        rollout.engine == "vllm" and rollout.placement == "server",
        f"{mode} trains while servers generate, and an engine on the trainer's own devices cannot generate meanwhile: "
        f"it needs rollout.engine=vllm and rollout.placement=server, got {rollout.engine} and {rollout.placement}",
    )
    for key, (is_set, why) in _needing_all_responses(method, needs, rollout, environment).items():
        require(not is_set, f"{key} {why}, which are not all there under {mode}: set one of them back")
    require(
        rollout.max_staleness >= rollout.ahead,
        f"{mode} trains on responses of weights that are up to {rollout.ahead} steps old: it needs "
        f"rollout.max_staleness of at least {rollout.ahead}, got {rollout.max_staleness}",
    )


def _needing_all_responses(
    method: str, needs: Needs, rollout: RolloutConfig, environment: EnvironmentConfig
) -> dict[str, tuple[bool, str]]:
    """Return whether each key needs all responses of a step at once, and why."""
    return {
        f"method.name={method}": (needs.hint != GIVEN, "changes the prompts of a step with responses"),
        f"environment.name={environment.name}": (environment.exists, "plays episodes turn by turn, all at once"),
        f"rollout.guidance={rollout.guidance}": (
            rollout.guidance != "none",
            "needs one version of the weights for each response",
        ),
    }
