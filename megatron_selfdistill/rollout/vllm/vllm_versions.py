# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Check the version of vLLM."""

from __future__ import annotations

import re

_GUIDED = ((0, 32),)
"""Versions of vLLM, as (major, minor), on which guided rollouts have run."""


def why_not_guided(version: str) -> str | None:
    """Return a message where guided rollouts have not run on this ``version`` of vLLM, None if they have.

    ``version`` is ``vllm.__version__``.  Guided rollouts take part in vLLM's scheduler, its first model runner and its
    sampling, none of which is a public interface: a change there could give wrong tokens without an error.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) in _GUIDED:
        return None
    known = " and ".join(f"{major}.{minor}" for major, minor in _GUIDED)
    return (
        f"rollout.guidance=mixed has run on vLLM {known} and not yet on {version}, which is installed here: install "
        f"vllm=={known}.*, set rollout.engine=megatron, or set rollout.guidance=none"
    )
