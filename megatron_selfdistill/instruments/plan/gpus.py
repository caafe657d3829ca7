# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The clock of a plan: what the kinds of GPU of cluster.gpu can do at best, and the shares that a run reaches.

Bandwidth, FLOP/s and links are those of NVIDIA's data sheets.  The bytes that a copy reaches are what others report
of an H100 and an H200; a B200 is assumed to reach the same share.  The other shares and the seconds are assumptions,
too, which nobody has measured for this project: with them an H100 writes a token of an 8 B model in 6.5 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_selfdistill.choices import GPUS


@dataclass(frozen=True)
class Gpu:
    """What one GPU does in a second."""

    bandwidth: float
    """The bytes that the GPU reads from its own memory."""
    copied: float
    """The bytes per second that a copy within its own memory reaches, read and written together."""
    flops: float
    """The FLOP of its dense bf16 matrix products."""
    link: float
    """The bytes that the GPU sends to the GPUs of its node, and receives at the same time."""

    @property
    def balance(self) -> float:
        """The sequences at which products of bf16 weights (2 FLOP for 2 bytes) take as long as reading the weights."""
        return PRODUCTS * self.flops / self.copied


RATES = dict(
    zip(
        GPUS,
        (
            Gpu(bandwidth=3.35e12, copied=2.9e12, flops=989e12, link=450e9),
            Gpu(bandwidth=4.8e12, copied=4.3e12, flops=989e12, link=450e9),
            Gpu(bandwidth=8.0e12, copied=7.0e12, flops=2250e12, link=900e9),
        ),
        strict=True,
    )
)
"""The kind of GPU -> its `Gpu`."""
MFU = 0.35
"""The share of `Gpu.flops` that training reaches: 30 to 40 % is usual on an H100."""
PRODUCTS = 0.79
"""The share of `Gpu.flops` that large products reach by themselves."""
NETWORK = 45e9
"""The bytes per second that a GPU sends to other nodes, through 400 Gb/s of its own."""
LAYER_SECONDS = 25e-6
"""The seconds that a layer of an engine adds to the reads of a token: the launches and the gaps of its kernels."""
ALL_REDUCE_SECONDS = 8e-6
"""The seconds of an all-reduce of a few tokens over the GPUs of an engine; a layer has two."""
WAKE_SECONDS = 2.0
"""The seconds in which a colocated engine falls asleep, wakes up, and takes its tensors one by one.

A plan counts all of them as phase ``sync``; a run falls asleep at the beginning of phase ``train``.
"""
