# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert Hugging Face directories to Megatron checkpoints and back, adapters too, and describe them.

    selfdistill convert hf-to-megatron --hf /models/Qwen3-8B --out qwen3
    selfdistill checkpoint.load=qwen3 data.tokenizer=/models/Qwen3-8B data.path=problems.jsonl run_dir=runs/first
    selfdistill convert megatron-to-hf --megatron runs/first --out Qwen3-8B-distilled
    selfdistill convert gguf-to-hf --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out SmolLM2-135M-Instruct
    selfdistill convert inspect runs/first

The command runs in one process and needs no GPU.  It takes about twice the memory of the largest tensor, for a model of
any size; megatron-to-hf also holds one file of weights (--max-shard-size), and gguf-to-hf the model in float32.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.terminal import print_error, visible

if TYPE_CHECKING:
    import torch

    from megatron_selfdistill.interop.release import Progress


EXIT_REFUSED = 2
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = ("bf16", "fp16", "fp32")
RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
NON_FINITE = "report weights that are NaN or infinite instead of refusing them"
BASE = "the base of the adapters, where it has moved (default: where the checkpoint says)"
OpenProgress = Callable[[], "AbstractContextManager[Progress]"]
"""A function that opens the display of a conversion's progress."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that partial files are removed
    # --help and a mistyped option do not wait for these imports; torch is imported after the arguments are checked.
    from megatron_selfdistill.errors import CheckpointError, ConfigError
    from megatron_selfdistill.terminal import silence_known_warnings

    silence_known_warnings()
    try:
        arguments.check(arguments)
        return int(arguments.run(arguments))
    except (CheckpointError, ConfigError) as error:
        print_error("convert:", error)
    except OSError as error:
        print_error("convert:", _os_error(error))
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return EXIT_REFUSED


def check_hf_to_megatron(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.interop.formats.directory import require_free

    require_free(arguments.out)
    prechecks.require_hugging_face(arguments.hf)


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    """Convert a Hugging Face directory to a Megatron checkpoint, and return the exit status."""
    from megatron_selfdistill.interop import conversion

    with _progress() as progress:
        target = conversion.hf_to_megatron(
            arguments.hf,
            arguments.out,
            dtype=dtype_of(arguments),
            allow_non_finite=arguments.allow_non_finite,
            progress=progress,
        )
    from megatron_selfdistill.interop.describe import megatron_lm_usage

    print(f"{target}: load it with checkpoint.load={arguments.out}")
    for name, value in megatron_lm_usage(target).items():
        print(f"{name}: {visible(value)}")
    return 0


def check_megatron_to_hf(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.interop.formats.directory import require_free
    from megatron_selfdistill.interop.formats.hf_files import read_config

    require_free(arguments.out)
    prechecks.require_checkpoint(arguments.megatron, arguments.iteration)
    if arguments.hf_config is not None:
        read_config(arguments.hf_config)


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    """Convert a Megatron checkpoint to a Hugging Face directory, and return the exit status."""
    from megatron_selfdistill.interop import conversion

    with _progress() as progress:
        target = conversion.megatron_to_hf(
            arguments.megatron,
            arguments.out,
            iteration=arguments.iteration,
            hf_config=arguments.hf_config,
            dtype=dtype_of(arguments),
            vocab_size=arguments.vocab_size,
            max_shard_bytes=arguments.max_shard_size,
            allow_non_finite=arguments.allow_non_finite,
            base=arguments.base,
            progress=progress,
        )
    print(f"{target}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})")
    return 0


def check_gguf_to_hf(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` or `ConfigError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill.interop import gguf
    from megatron_selfdistill.interop.formats.directory import require_free

    require_free(arguments.out)
    gguf.require_gguf(arguments.gguf)


def gguf_to_hf(arguments: argparse.Namespace) -> int:
    """Convert a GGUF file to a Hugging Face directory, and return the exit status."""
    from megatron_selfdistill.interop import gguf

    os.environ.setdefault("TQDM_DISABLE", "1")  # the readers' bars would mix with this command's own
    with _progress() as progress:
        target = gguf.gguf_to_hf(
            arguments.gguf,
            arguments.out,
            dtype=dtype_of(arguments),
            allow_non_finite=arguments.allow_non_finite,
            progress=progress,
        )
    print(f"{target}: convert it with selfdistill convert hf-to-megatron --hf {target} --out NEW_DIRECTORY")
    return 0


def check_inspect(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks

    if not prechecks.is_hugging_face(arguments.checkpoint):
        prechecks.require_checkpoint(arguments.checkpoint)


def inspect(arguments: argparse.Namespace) -> int:
    """Print the description of a checkpoint or a Hugging Face directory, and return the exit status."""
    from megatron_selfdistill.interop.describe import describe

    found = describe(arguments.checkpoint)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {visible(value)}")
    return 0


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar with bytes and the remaining time if stderr is a terminal, and decisions as lines above the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    from megatron_selfdistill.interop.release import Progress

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield Progress(
            start=lambda num_bytes: bar.update(task, total=num_bytes),
            advance=lambda num_bytes: bar.advance(task, num_bytes),
            report=lambda line: console.print(visible(line), markup=False, highlight=False, soft_wrap=True),
        )


class ListOfFamilies(argparse.Action):
    """The option that prints the architectures that convert, one per line, and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print a table of architecture, published models and limits."""
        from rich.console import Console
        from rich.table import Table

        from megatron_selfdistill.interop.hf.mapping import FAMILIES

        table = Table("architectures in config.json", "models", "what is required", box=None, pad_edge=False)
        for family in FAMILIES.values():
            table.add_row(family.architecture, family.models, family.limits.replace("`", ""))
        Console(highlight=False, soft_wrap=False).print(table)
        parser.exit()


def _os_error(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}: nothing was left behind; make room and start again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{os.strerror(error.errno)}:{where} cannot be written or read; nothing was left behind"
    return f"{error}; nothing was left behind"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = match[2] if match else None
    unit = f"{unit}B" if unit and not unit.endswith("B") else unit
    if match is None or unit not in {*_UNITS, "B"}:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MiB, got {text!r}")
    return int(float(match[1]) * _UNITS["" if unit == "B" else unit])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfdistill convert", description=__doc__, **RAW)
    parser.add_argument("--list", action=ListOfFamilies, nargs=0, help="print what converts and with what limits")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_hf_to_megatron(commands)
    _add_megatron_to_hf(commands)
    _add_gguf_to_hf(commands)
    add_to(commands, _progress)
    _add_inspect(commands)
    return parser


def _add_hf_to_megatron(commands: Any) -> None:
    command = commands.add_parser(
        "hf-to-megatron",
        help="convert a Hugging Face directory to a torch_dist checkpoint, which loads in any parallel layout",
        description="Convert a Hugging Face directory to a torch_dist checkpoint, which loads in any layout.",
        epilog="example:\n  selfdistill convert hf-to-megatron --hf /models/Qwen3-8B --out qwen3 --dtype bf16",
        **RAW,
    )
    command.set_defaults(check=check_hf_to_megatron, run=hf_to_megatron)
    command.add_argument("--hf", type=Path, required=True, metavar="DIR", help="directory with config.json and weights")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the checkpoint")
    command.add_argument("--format", choices=["torch_dist"], default="torch_dist", help="format of the checkpoint")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: unchanged; FP8 becomes bf16)")
    command.add_argument("--allow-non-finite", action="store_true", help=NON_FINITE)


def _add_megatron_to_hf(commands: Any) -> None:
    command = commands.add_parser(
        "megatron-to-hf",
        help="convert a Megatron checkpoint (torch_dist or legacy) to a Hugging Face directory",
        description="Convert a Megatron checkpoint, torch_dist or legacy, to a directory for transformers and vLLM.\n"
        "Adapters are merged into their base in float32 and rounded once: bf16 can lose small updates, and\n"
        "--dtype fp32 loses none.",
        epilog="example:\n  selfdistill convert megatron-to-hf --megatron runs/first --iteration 100 \\\n"
        "      --out Qwen3-8B-distilled --hf-config /models/Qwen3-8B",
        **RAW,
    )
    command.set_defaults(check=check_megatron_to_hf, run=megatron_to_hf)
    add_checkpoint(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new Hugging Face directory")
    command.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="directory with the original config.json and tokenizer (default: the HF assets of the checkpoint)",
    )
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: unchanged)")
    command.add_argument("--base", type=Path, metavar="DIR", help=BASE)
    command.add_argument(
        "--vocab-size", type=int, metavar="N", help="vocabulary without padding, if the checkpoint does not state it"
    )
    command.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        help="largest size of a weights file (default: 5GB)",
    )
    command.add_argument("--allow-non-finite", action="store_true", help=NON_FINITE)


def _add_gguf_to_hf(commands: Any) -> None:
    command = commands.add_parser(
        "gguf-to-hf",
        help="convert a GGUF file to a Hugging Face directory (needs the extra gguf)",
        description="Multiply the weights of a GGUF file out, and write them with config.json and tokenizer.",
        epilog="example:\n  selfdistill convert gguf-to-hf --gguf SmolLM2-135M-Instruct.Q4_1.gguf \\\n"
        "      --out SmolLM2-135M-Instruct",
        **RAW,
    )
    command.set_defaults(check=check_gguf_to_hf, run=gguf_to_hf)
    command.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="one file with weights and tokenizer")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new Hugging Face directory")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: fp32)")
    command.add_argument("--allow-non-finite", action="store_true", help=NON_FINITE)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="describe a checkpoint or a Hugging Face directory",
        description="Print family, sizes, parallel layout, iteration, parameters, types, true and padded vocabulary.",
        epilog="example:\n  selfdistill convert inspect runs/first",
        **RAW,
    )
    command.set_defaults(check=check_inspect, run=inspect)
    command.add_argument(
        "checkpoint", type=Path, metavar="DIR", help="run directory, Megatron checkpoint or Hugging Face directory"
    )


def dtype_of(arguments: argparse.Namespace) -> torch.dtype | None:
    """Return the type that ``--dtype`` names, None without it."""
    from megatron_selfdistill.interop import conversion

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
    from megatron_selfdistill.interop.formats.directory import of_iteration, require_free
    from megatron_selfdistill.interop.formats.stored_adapters import require_adapters

    require_free(arguments.out)
    prechecks.require_checkpoint(arguments.megatron, arguments.iteration)
    require_adapters(of_iteration(arguments.megatron, arguments.iteration))


def check_peft_to_megatron(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for every mistake that can be found without importing torch."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.interop.formats.directory import require_free

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
        from megatron_selfdistill.interop import peft_adapters

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
        from megatron_selfdistill.interop import peft_adapters
        from megatron_selfdistill.interop.formats.stored_adapters import require_adapters

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
        from megatron_selfdistill.interop import merged_weights

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
