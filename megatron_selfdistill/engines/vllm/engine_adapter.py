# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The adapters of a run as a vLLM engine takes them: one LoRA adapter, whose factors each update replaces.

    adapter = EngineAdapter.of(config.adapter, adapter_rules(rules, config.adapter))
    arguments = adapter.engine_args()   # of the engine

The engine holds the frozen weights once and computes the adapter beside them.  Factors that were merged into bf16
weights would lose most of a small change in the rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.interop.hf.adapter_rules import PEFT_PREFIX

if TYPE_CHECKING:
    from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
    from megatron_selfdistill.interop.hf.rules import Rule

ADAPTER_NAME = "selfdistill"
"""The name of the adapter in an engine; a request without adapter names none."""
ADAPTER_ID = 1
"""vLLM's number of the adapter."""
ADAPTER_PATH = "the factors that the trainer sends"
"""vLLM's path of the adapter, from which nothing is read: vLLM would name it where a worker lacks the factors."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's max_lora_rank; the schema refuses larger ranks."""


@dataclass(frozen=True)
class EngineAdapter:
    """What an engine must know of the adapters beside their factors; JSON values."""

    rank: int
    """Rank r of the factors."""
    alpha: float
    """Numerator of the scale."""
    rank_stabilised: bool
    """Whether the scale is alpha / sqrt(r) instead of alpha / r."""
    modules: Sequence[str]
    """The last names of the Hugging Face modules with factors, such as q_proj."""

    @staticmethod
    def of(adapter: AdapterConfig, rules: Iterable[Rule]) -> EngineAdapter:
        """Return the description of the adapters that ``rules`` (`adapter_rules`) name."""
        modules = {module_of(name).rpartition(".")[2] for rule in rules for name in rule.hf_names}
        return EngineAdapter(adapter.rank, float(adapter.alpha), adapter.rank_stabilised, sorted(modules))

    def engine_args(self, *, on_cpu: bool) -> dict[str, Any]:
        """Return vLLM's engine arguments: room for one adapter of the next rank that vLLM knows, on these modules.

        On a CPU there is room for two: vLLM's kernels of 0.32 read the last place for a request without adapter, which
        must therefore be another place than the adapter's and empty.
        """
        places = 2 if on_cpu else 1
        return {
            "enable_lora": True,
            "max_loras": places,
            "max_cpu_loras": places,
            "max_lora_rank": min((rank for rank in RANKS if rank >= self.rank), default=self.rank),
            "lora_target_modules": list(self.modules),
            "lora_dtype": "auto",
        }

    def server_args(self) -> list[str]:
        """Return the arguments of `selfdistill serve` with which a server takes these adapters."""
        return [f"--adapter-rank={self.rank}", f"--adapter-modules={','.join(self.modules)}"]


def module_of(name: str) -> str:
    """Return the Hugging Face module of a factor with PEFT's name, such as ``model.layers.0.self_attn.q_proj``."""
    return name.removeprefix(PEFT_PREFIX).rsplit(".", 2)[0]
