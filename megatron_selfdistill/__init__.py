# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On-policy self-distillation for Megatron: the model that read a solution teaches the one that did not.

Importing the package imports nothing else: ``megatron_selfdistill.loss`` stays usable where only torch is.
"""

__version__ = "0.1.0"
