# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Methods that a vLLM worker has besides its own, called through ``collective_rpc``; importing this file also registers
our ways of weight transfer, in the process that needs them."""

from __future__ import annotations


class WorkerExtension:
    """Becomes a base class of vLLM's worker (``--worker-extension-cls``), so no name may be one of the worker's own.

    Arguments and results are JSON values: they travel over HTTP.
    """
