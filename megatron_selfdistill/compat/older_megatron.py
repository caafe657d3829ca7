# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What Megatron Core before 0.19 alone needs: each function names the version until which it is needed.

The package is written for Megatron Core 0.19.  Without this file, its callers would call 0.19 directly.  The import of
this module imports nothing of Megatron.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEWEST = (0, 19)
"""The newest version that this program knows."""


@functools.cache
def version() -> tuple[int, int]:
    """Return the major and the minor version of the Megatron Core that is installed; `NEWEST` where there is none."""
    spec = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    places = (spec.submodule_search_locations or ()) if spec else ()
    text = "".join((Path(place) / "package_info.py").read_text(encoding="utf-8") for place in places)
    numbers = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)$", text, re.MULTILINE))
    return int(numbers.get("MAJOR", NEWEST[0])), int(numbers.get("MINOR", NEWEST[1]))


def version_text() -> str:
    """Return `version` as a text, such as 0.19."""
    return ".".join(map(str, version()))


def stores_common_file() -> bool:
    """Return whether Megatron stores the state that is no tensor in common.pt; until 0.19.

    Later versions store this state as an object in the files of the tensors.
    """
    return version() < (0, 19)


def cuts_random_states_by_data(ep_size: int) -> bool:
    """Return whether Megatron-LM looks for the random states of each data-parallel rank; until 0.17.

    It did with expert parallelism, ``ep_size > 1``.
    """
    return ep_size > 1 and version() < (0, 17)


def save_options() -> dict[str, Any]:
    """Return the options of ``dist_checkpointing.save`` that choose Megatron's own writer; until 0.17."""
    return {} if version() < (0, 17) else {"async_strategy": "mcore"}


def name_results_queue() -> None:
    """Give ``filesystem_async`` the public name of the queue with the results of its writers; until 0.17."""
    filesystem_async: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if not hasattr(filesystem_async, "get_write_results_queue"):
        filesystem_async.get_write_results_queue = filesystem_async._get_write_results_queue
        filesystem_async._get_write_results_queue = lambda: filesystem_async.get_write_results_queue()


def name_missing_kernels() -> None:
    """Define what router and latent attention look up where Transformer Engine is missing; until 0.17."""
    if version() >= (0, 17):
        return
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as multi_latent_attention

    for name in "te_general_gemm fused_permute fused_unpermute fused_sort_chunks_by_index".split():
        vars(moe_utils).setdefault(name, None)
    multi_latent_attention.HAVE_TE = False  # wrongly True, and the code calls isinstance(x, None)


def mark_replicated_experts(model: Any) -> None:
    """Mark weights of experts that several tensor-parallel ranks hold, so that their gradients are added; until 0.19.

    Tensor-parallel ranks send different tokens to experts that are not cut (``expert_tensor_parallel_size`` below
    ``tensor_model_parallel_size``).  Megatron Core adds the gradients of an expert over the ranks that hold it only
    where the weight has the mark ``allreduce=False``, which it sets for ``expert_model_parallel_size > 1`` only.
    """
    config = None if version() >= (0, 19) else getattr(model, "config", None)
    if config is None or config.expert_tensor_parallel_size == config.tensor_model_parallel_size:
        return
    for name, param in model.named_parameters():
        if ".experts." in name:
            param.allreduce = False


def inference_pass() -> contextlib.AbstractContextManager[None]:
    """Return the context of a forward pass that samples, in which Megatron projects the last position; until 0.18.

    Earlier versions look for an inference context among the arguments of the pass instead.
    """
    if version() < (0, 18):
        return contextlib.nullcontext()
    mode: Any = importlib.import_module("megatron.core.inference.utils").InferenceMode
    active: contextlib.AbstractContextManager[None] = mode.active()
    return active


def submodules_of(spec: Any) -> Any:
    """Return the submodules of ``spec``, a ``functools.partial`` or, until 0.19, a ``ModuleSpec``; None without any."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else getattr(spec, "submodules", None)


def with_older_keyword(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``rotate`` with ``multi_latent_attention`` as the name of ``mla_rotary_interleaved``; until 0.19."""
    if version() >= (0, 19):
        return rotate

    @functools.wraps(rotate)
    def renamed(*args: Any, multi_latent_attention: bool = False, **kwargs: Any) -> Any:
        return rotate(*args, mla_rotary_interleaved=multi_latent_attention, **kwargs)

    return renamed
