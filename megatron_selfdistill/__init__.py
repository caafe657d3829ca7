# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On-policy self-distillation for Megatron: the model with a solution teaches itself without it.

The import of this package imports nothing else, so ``megatron_selfdistill.loss`` works where only torch is installed.
"""

__version__ = "0.2.0"
