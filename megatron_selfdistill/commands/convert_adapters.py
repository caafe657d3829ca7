# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of `selfdistill convert` that are about adapters: to and from PEFT, and merging into a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_selfdistill.checkpoint.conversion_progress import Progress

DTYPES = ("bf16", "fp16", "fp32")
RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
NON_FINITE = "report weights that are NaN or infinite instead of refusing them"
BASE = "the base of the adapters, where it has moved (default: where the checkpoint says)"

OpenProgress = Callable[[], "AbstractContextManager[Progress]"]
"""A function that opens the display of a conversion's progress."""


def dtype_of(arguments: argparse.Namespace) -> torch.dtype | None:
    """Return the type that ``--dtype`` names, None without it."""
    from megatron_selfdistill.checkpoint import conversion

    return conversion.DTYPES[arguments.dtype] if arguments.dtype else None


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Add the options that name the checkpoint to convert: ``--megatron`` and ``--iteration``."""
    command.add_argument(
        "--megatron",
        type=Path,
        required=True,
        metavar="DIR",
        help="run directory, or Megatron checkpoint (an iter_ directory, or the one with the tracker file)",
    )
    command.add_argument(
        "--iteration", type=int, metavar="N", help="iteration to convert (default: the tracker file names it)"
    )


def check_adapters(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.checkpoint.directory import of_iteration, require_free
    from megatron_selfdistill.checkpoint.stored_adapters import require_adapters

    require_free(arguments.out)
    prechecks.require_checkpoint(arguments.megatron, arguments.iteration)
    require_adapters(of_iteration(arguments.megatron, arguments.iteration))


def check_peft_to_megatron(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.checkpoint.directory import require_free

    require_free(arguments.out)
    prechecks.require_checkpoint(arguments.base)


def add_to(commands: Any, progress: OpenProgress) -> None:
    """Add the sub-commands to those of `selfdistill convert`."""
    _add_megatron_to_peft(commands, progress)
    _add_peft_to_megatron(commands, progress)
    _add_merge_adapters(commands, progress)


def _add_megatron_to_peft(commands: Any, progress: OpenProgress) -> None:
    command = commands.add_parser(
        "megatron-to-peft",
        help="convert a checkpoint of adapters to a directory of PEFT",
        description="Write a checkpoint of adapters as a directory for peft.PeftModel.from_pretrained and vLLM.",
        epilog="example:\n  selfdistill convert megatron-to-peft --megatron runs/first --out adapters \\\n"
        "      --base-model Qwen/Qwen3-8B",
        **RAW,
    )

    def run(arguments: argparse.Namespace) -> int:
        from megatron_selfdistill.checkpoint import peft_adapters

        with progress() as shown:
            target = peft_adapters.megatron_to_peft(
                arguments.megatron,
                arguments.out,
                iteration=arguments.iteration,
                base_model=arguments.base_model,
                dtype=dtype_of(arguments),
                progress=shown,
            )
        print(f"{target}: load it with peft.PeftModel.from_pretrained(model, {str(target)!r})")
        return 0

    command.set_defaults(check=check_adapters, run=run)
    add_checkpoint(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
    command.add_argument(
        "--base-model",
        metavar="NAME_OR_DIR",
        help="base_model_name_or_path: the Hugging Face model of the base (default: null)",
    )
    command.add_argument("--dtype", choices=DTYPES, help="type of the factors (default: unchanged)")


def _add_peft_to_megatron(commands: Any, progress: OpenProgress) -> None:
    command = commands.add_parser(
        "peft-to-megatron",
        help="convert a directory of PEFT to a checkpoint of adapters",
        description="Convert a directory of PEFT to a checkpoint of adapters for adapter.load and evaluations.\n"
        "Modules that Megatron fuses into one layer (q, k, v; gate, up) share one factor A: different A are\n"
        "stacked, which is exact and makes the rank up to three times as large.",
        epilog="example:\n  selfdistill convert peft-to-megatron --peft adapters \\\n"
        "      --base checkpoints/qwen3-8b --out lora",
        **RAW,
    )

    def run(arguments: argparse.Namespace) -> int:
        from megatron_selfdistill.checkpoint import peft_adapters
        from megatron_selfdistill.checkpoint.stored_adapters import require_adapters

        with progress() as shown:
            target = peft_adapters.peft_to_megatron(
                arguments.peft, arguments.base, arguments.out, dtype=dtype_of(arguments), progress=shown
            )
        begin = f"checkpoint.load={arguments.base} adapter.load={arguments.out} {require_adapters(target).overrides()}"
        print(f"{target}: begin a run at it with {begin}")
        return 0

    command.set_defaults(check=check_peft_to_megatron, run=run)
    command.add_argument("--peft", type=Path, required=True, metavar="DIR", help="directory with adapter_config.json")
    command.add_argument(
        "--base",
        type=Path,
        required=True,
        metavar="DIR",
        help="run directory or Megatron checkpoint of the model of these adapters",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the checkpoint")
    command.add_argument("--dtype", choices=DTYPES, help="type of the factors (default: unchanged)")


def _add_merge_adapters(commands: Any, progress: OpenProgress) -> None:
    command = commands.add_parser(
        "merge-adapters",
        help="merge a checkpoint of adapters and its base into a full checkpoint",
        description="Write a full torch_dist checkpoint: W + scale * B A, computed in float32 and rounded once.\n"
        "Rounding to bf16 can lose small updates; the output says how many elements stay as they were.\n"
        "For a Hugging Face directory use megatron-to-hf, which merges adapters, too.",
        epilog="example:\n  selfdistill convert merge-adapters --megatron runs/first --out merged",
        **RAW,
    )

    def run(arguments: argparse.Namespace) -> int:
        from megatron_selfdistill.checkpoint import merged_weights

        with progress() as shown:
            target = merged_weights.merge_adapters(
                arguments.megatron,
                arguments.out,
                iteration=arguments.iteration,
                base=arguments.base,
                allow_non_finite=arguments.allow_non_finite,
                progress=shown,
            )
        print(f"{target}: load it with checkpoint.load={arguments.out}")
        return 0

    command.set_defaults(check=check_adapters, run=run)
    add_checkpoint(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the checkpoint")
    command.add_argument("--base", type=Path, metavar="DIR", help=BASE)
    command.add_argument("--allow-non-finite", action="store_true", help=NON_FINITE)
