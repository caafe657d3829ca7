# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On-policy self-distillation for Megatron: the model with a solution teaches itself without it.

The import of this package imports nothing else, so ``megatron_selfdistill.loss`` works where only torch is installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_selfdistill.commands.self_distiller import SelfDistiller

__version__ = "0.2.0"
__all__ = ["SelfDistiller", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "SelfDistiller":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_selfdistill.commands.self_distiller import SelfDistiller

    return SelfDistiller
