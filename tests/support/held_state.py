# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a rank of Megatron-LM, or of this project, holds after it loaded or trained a model."""

from __future__ import annotations

from typing import Any


def held(chunks: Any, optimizer: Any) -> dict[str, Any]:
    """Return the weights and the optimizer's moments of this rank, and the counts of Adam's steps."""
    inner = [single.optimizer for single in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [state for one in inner for state in one.state.values()]
    moments = {
        f"{index}.{key}": state[key].clone()
        for one in inner
        for index, state in enumerate(one.state.values())
        for key in ("exp_avg", "exp_avg_sq")
    }
    counted = [state["step"] for state in states if "step" in state]
    counted += [group["step"] for one in inner for group in one.param_groups if "step" in group]
    return {
        "adam_steps": [int(count) for count in counted],
        "weights": {name: p.detach().clone() for name, p in chunks[0].named_parameters()},
        "moments": moments,
    }
