# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``rollout`` of the schema: how responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_selfdistill.config.schema.data_config import episodes_key, plays_episodes
from megatron_selfdistill.config.schema.field_checks import Part, require, require_address
from megatron_selfdistill.config.schema.method_config import GIVEN, sampled_log_probs_key
from megatron_selfdistill.config.schema.ranges import (
    MAX_WAIT,
    DifferentEntries,
    Directory,
    FilePath,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    NumberOrRamp,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Ranks,
    Text,
    above,
    at_least,
    at_most,
)


@dataclass(frozen=True)
class RolloutConfig(
    Part,
    section="rollout",
    free="engine placement engine_tp engine_args hf_config servers num_servers server_python server_env transfer "
    "transfer_dir bucket_mb timeout_s max_staleness ahead at_update kv_cache_gb cuda_graphs",
):
    """The sampling of the student's responses."""

    binds: ClassVar = {"rollout.guidance": "target", "rollout.guide_below": "judge"}
    engine: Annotated[str, OneOf(("megatron", "vllm"))] = "megatron"
    """The sampler: megatron (the model in training itself, with a KV cache) or vllm."""
    placement: Annotated[str, OneOf(("colocated", "server"))] = "colocated"
    """The place where vLLM runs: colocated (in the processes of the trainer, on the same devices) or server (in its own
    processes, on other devices or nodes; the trainer's environment then needs no vLLM)."""
    engine_tp: Ranks = 1
    """Tensor-parallel size of a vLLM engine.  With placement=colocated this number of consecutive ranks forms one
    engine."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine by their own names, such as max_num_seqs; they override the values that this
    project derives, but for the ranks of a colocated engine (engine_tp)."""
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
    transfer: Annotated[str, OneOf(("shared_memory", "gloo", "nccl"))] | None = None
    """The transfer of weights to servers: shared_memory (files in transfer_dir), gloo or nccl.  Null takes nccl on GPUs
    where all servers have the trainer's version of NCCL, otherwise shared_memory where all workers can read files in
    transfer_dir, otherwise gloo."""
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
    at_update: Annotated[str, OneOf(("wait", "keep"))] = "wait"
    """The fate of responses under way when servers get new weights, under ahead: wait (the update waits until they are
    finished) or keep (they go on with the new weights)."""
    guidance: Annotated[str, OneOf(("none", "mixed"))] = "none"
    """The model that chooses the tokens: none (the student alone) or mixed (each token is sampled from the target
    itself, from all its contexts at once; needs engine=megatron).  Mixed responses are off-policy for the student."""
    guide_below: Annotated[float, above(0), at_most(1)] | None = None
    """The recent success rate below which guidance=mixed guides a problem, which needs answers; every fourth visit to
    such a problem samples without guidance, to know its rate.  Null guides all problems."""
    num_samples: PositiveInt = 1
    """Number of responses per problem and step."""
    max_new_tokens: PositiveInt = 256
    """Length of the longest response, in tokens."""
    horizon: Annotated[Any, NumberOrRamp(("auto", None))] = None
    """The greatest number of tokens of a response in training, at most max_new_tokens, which remains that of
    evaluations: a number, or [FIRST, LAST, STEPS] (FIRST in the first step, growing in a line over STEPS steps, then
    LAST), or auto (where method.token_weights=reach: as many as the weights of the last steps ask for, with room to
    grow).  A response that is as long without a stop token is unfinished: no end is trained there, and the step knows
    nothing of its rest.  Prompts leave room for max_new_tokens all the same."""
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
    cuda_graphs: bool = False
    """Whether rollout.engine=megatron decodes dense models from CUDA graphs, which no GPU has run yet."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where responses would be sampled in another way than the keys say."""
        on_servers = self.engine == "vllm" and self.placement == "server"
        require(
            on_servers == (bool(self.servers) != bool(self.num_servers)),
            "rollout.engine=vllm with rollout.placement=server needs either rollout.servers (addresses of servers that "
            "run) or rollout.num_servers (servers that the run starts), and no other sampler has servers",
        )
        no_graphs = "rollout.cuda_graphs=true is for rollout.engine=megatron: vLLM has its own CUDA graphs"
        require(not self.cuda_graphs or self.engine == "megatron", no_graphs)
        for address in self.servers:
            require_address("rollout.servers", address, "http://node7:8000")
        is_plain = self.temperature in (0, 1) and self.top_k == 0 and self.top_p == 1
        require(
            not self.samples_target or (self.engine != "vllm" and is_plain),
            "rollout.guidance=mixed samples from the target itself, in process: it needs rollout.engine=megatron, "
            f"rollout.temperature=1 (or 0), top_k=0 and top_p=1, got {self.engine}, {self.temperature}, {self.top_k} "
            f"and {self.top_p}",
        )
        has_own = config.needs.own_prompts or config.needs.hint_follows
        require(
            not self.samples_target or (config.samples_responses and not has_own and not plays_episodes(config)),
            "rollout.guidance=mixed samples from prompts and hints that are known before: it needs a method that "
            f"samples and has no prompts or hints of its own, and no episodes, got data.kind={config.data.kind} and "
            f"method.name={config.method.name}: set rollout.guidance=none",
        )
        key, plain = sampled_log_probs_key(config), self.temperature == 1 and self.top_k == 0 and self.top_p == 1
        require(
            key is None or not config.samples_responses or (self.temperature > 0 and (self.engine != "vllm" or plain)),
            f"{key} needs the log-probs of sampled tokens, which rollout.temperature=0 does not have, and which vLLM "
            "reports at temperature 1 only: set rollout.temperature=1, top_k=0 and top_p=1, got "
            f"{self.temperature}, {self.top_k} and {self.top_p}",
        )
        is_whole = config.needs.hint == GIVEN and not plays_episodes(config) and not self.samples_target
        require(
            not self.ahead or (on_servers and is_whole),
            f"rollout.ahead={self.ahead} trains while servers generate: it needs rollout.engine=vllm and "
            "rollout.placement=server, and no episodes, rollout.guidance or method that needs all responses of a step "
            f"at once, got method.name={config.method.name}",
        )
        if self.horizon is not None:
            self._check_horizon(config)

    def _check_horizon(self, config: Any) -> None:
        """Raise `ConfigError` where the horizon bounds nothing, or cuts what something must see whole."""
        key, longest = f"rollout.horizon={self.horizon}", self.longest_trained
        require(
            longest <= self.max_new_tokens,
            f"{key} must end responses within rollout.max_new_tokens={self.max_new_tokens}, got {longest} tokens",
        )
        source = f"data.kind={config.data.kind} with method.name={config.method.name}"
        require(config.samples_responses, f"{key} bounds sampled responses, but {source} samples none: unset it")
        select = getattr(config.method, "select", None)
        readers = {
            episodes_key(config): plays_episodes(config),
            f"rollout.guide_below={self.guide_below}": self.guide_below is not None,
            f"method.select={select}": select is not None,
            f"method.name={config.method.name}": config.needs.reads_whole,
        }
        require(
            self.horizon != "auto" or getattr(config.method, "token_weights", None) == "reach",
            f"{key} follows the weights of tokens: it needs method.token_weights=reach",
        )
        require(
            self.horizon != "auto" or not self.ahead,
            f"{key} follows the step before, but rollout.ahead={self.ahead} samples earlier: unset one of both",
        )
        reader = next((name for name, reads in readers.items() if reads), None)
        require(reader is None, f"{key} ends responses early, but {reader} needs whole ones: unset one of both")

    def horizon_at(self, step: int) -> int | None:
        """Return the horizon of the step that ``step`` optimizer steps precede; None if no key states it."""
        if not isinstance(self.horizon, list):
            return self.horizon if isinstance(self.horizon, int) else None
        first, last, steps = self.horizon
        return int(first + (last - first) * min(step, steps) // steps)

    @property
    def has_one_horizon(self) -> bool:
        """Whether the responses of all steps may be equally long."""
        return not isinstance(self.horizon, list | str)

    @property
    def longest_trained(self) -> int:
        """The greatest number of tokens of a response in training, over all steps."""
        longest = self.horizon[1] if isinstance(self.horizon, list) else self.horizon
        return longest if isinstance(longest, int) else self.max_new_tokens

    @property
    def samples_target(self) -> bool:
        """Whether responses are sampled from the target itself."""
        return self.guidance != "none"

    @property
    def is_colocated(self) -> bool:
        """Whether vLLM engines sample in the trainer's own processes, on the trainer's devices."""
        return self.engine == "vllm" and self.placement == "colocated"
