# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The task of subtraction.py for a base with the architecture of Llama, which vLLM can run too."""

from __future__ import annotations

import dataclasses

from _lib import subtraction

TASK = dataclasses.replace(subtraction.TASK, name="llama_subtraction", overrides=("model=tiny_llama",))
