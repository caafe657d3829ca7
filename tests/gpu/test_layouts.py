# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Training steps on the device equal those of one CPU rank in float32, in every layout.

NCCL refuses two ranks on one GPU; there they communicate through host memory (staged.py).
"""

from __future__ import annotations

import pytest

from tests.gpu import cases, layout_steps

ALL = {
    **{f"as a run: {name}": (one, "staged") for name, one in cases.AS_A_RUN.items()},
    **{name: (one, "staged") for name, one in (cases.ONE_RANK | cases.SEVERAL_RANKS).items()},
    **{f"NCCL: {name}": (one, "nccl") for name, one in cases.EIGHT_GPUS.items()},
}
OF_EIGHT, SMOKE = [pytest.mark.gpus(8)], [pytest.mark.smoke]
PARAMS = [
    pytest.param(name, marks=OF_EIGHT if name.startswith("NCCL") else SMOKE if name in ("MLA", "TP2") else [])
    for name in ALL
]


@pytest.mark.parametrize("name", PARAMS)
def test_a_training_step_equals_that_of_one_cpu_rank(name, ranks_of, reference, tmp_path, keeps, on_gpu):
    one, backend = ALL[name]
    # Most cases are float32, which Transformer Engine's attention does not support: they compare the local layers.
    without = () if name.startswith("as a run") else ("transformer_engine",)
    ranks = ranks_of(one.world_size, *without)
    layout_steps.check(one, ranks, reference, tmp_path / "store", keeps, backend=backend, on_gpu=on_gpu)
