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
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.distributed.terminal import print_error, visible

if TYPE_CHECKING:
    from megatron_selfdistill.interop.release import Progress


EXIT_REFUSED = 2
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
_NEW_CHECKPOINT = "new directory for the checkpoint"
_NEW_HF = "new Hugging Face directory"
Advice = Callable[[Path, argparse.Namespace], Iterator[str]]
"""A function from the new directory and the arguments to the lines that say how to use the directory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that partial files are removed
    # --help and a mistyped option do not wait for these imports; torch is imported after the arguments are checked.
    from megatron_selfdistill.distributed.terminal import silence_known_warnings
    from megatron_selfdistill.errors import CheckpointError, ConfigError

    silence_known_warnings()
    try:
        _check(arguments)
        return int(arguments.run(arguments))
    except (CheckpointError, ConfigError) as error:
        print_error("convert:", error)
    except OSError as error:
        print_error("convert:", _os_error(error))
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return EXIT_REFUSED


def _check(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for the mistakes in the names of directories that no import of torch has to find."""
    from megatron_selfdistill.checkpoint.formats.directory import is_hugging_face, require_checkpoint, require_free
    from megatron_selfdistill.checkpoint.formats.hf_files import require_hugging_face

    named = vars(arguments)
    if "out" in named:
        require_free(arguments.out)
    if "hf" in named:
        require_hugging_face(arguments.hf)
    if "megatron" in named:
        require_checkpoint(arguments.megatron, arguments.iteration)
    if "checkpoint" in named and not is_hugging_face(arguments.checkpoint):
        require_checkpoint(arguments.checkpoint)


def _convert(arguments: argparse.Namespace) -> int:
    """Call the function of the sub-command with the values of its options, and return the exit status."""
    module, _, name = arguments.function.rpartition(".")
    function = getattr(importlib.import_module(f"megatron_selfdistill.interop.{module}"), name)
    values = {key: value for key, value in vars(arguments).items() if key not in ("list", "run", "function", "advice")}
    if values.get("dtype") is not None:
        from megatron_selfdistill.interop.conversion import DTYPES

        values["dtype"] = DTYPES[values["dtype"]]
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries would mix with this command's own
    with _progress() as progress:
        target = function(**values, progress=progress)
    for line in arguments.advice(target, arguments):
        print(line)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
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
    parser = argparse.ArgumentParser(prog="selfdistill convert", description=__doc__, **_RAW)
    parser.add_argument("--list", action=ListOfFamilies, nargs=0, help="print what converts and with what limits")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_hf_to_megatron(commands)
    _add_megatron_to_hf(commands)
    _add_gguf_to_hf(commands)
    _add_megatron_to_peft(commands)
    _add_peft_to_megatron(commands)
    _add_merge_adapters(commands)
    command = commands.add_parser(
        "inspect",
        help="describe a checkpoint or a Hugging Face directory",
        description="Print family, sizes, parallel layout, iteration, parameters, types, true and padded vocabulary.",
        epilog="example:\n  selfdistill convert inspect runs/first",
        **_RAW,
    )
    command.set_defaults(run=_inspect)
    _directory(command, "checkpoint", "run directory, Megatron checkpoint or Hugging Face directory")
    return parser


def _add(
    commands: Any, function: str, advice: Advice, *, example: str, out: str, dtype: str | None = None, **texts: str
) -> argparse.ArgumentParser:
    """Add and return the sub-command that calls ``function``, with the options that most sub-commands share.

    ``function``: ``module.name`` in this package; it receives each option under the name of its destination.
    ``out``: the help of ``--out``.  ``dtype``: the help of ``--dtype``; null adds no such option.
    """
    name = function.rpartition(".")[2].replace("_", "-")
    epilog = f"example:\n  selfdistill convert {name} {example}"
    command: argparse.ArgumentParser = commands.add_parser(name, epilog=epilog, **texts, **_RAW)
    command.set_defaults(run=_convert, function=function, advice=advice)
    _directory(command, "--out", out, required=True)
    if dtype is not None:
        command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help=dtype)
    return command


def _directory(command: argparse.ArgumentParser, name: str, help_text: str, **options: Any) -> None:
    command.add_argument(name, type=Path, metavar="DIR", help=help_text, **options)


def _add_allow_non_finite(command: argparse.ArgumentParser) -> None:
    words = "report weights that are NaN or infinite instead of refusing them"
    command.add_argument("--allow-non-finite", action="store_true", help=words)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Add the options that name the checkpoint to convert: ``--megatron`` and ``--iteration``."""
    place = "run directory, or Megatron checkpoint (an iter_ directory, or the one with the tracker file)"
    _directory(command, "--megatron", place, required=True)
    command.add_argument(
        "--iteration", type=int, metavar="N", help="iteration to convert (default: the tracker file names it)"
    )


def _add_moved_base(command: argparse.ArgumentParser) -> None:
    _directory(command, "--base", "the base of the adapters, where it has moved (default: where the checkpoint says)")


def _add_hf_to_megatron(commands: Any) -> None:
    def advice(target: Path, arguments: argparse.Namespace) -> Iterator[str]:
        from megatron_selfdistill.interop.describe import megatron_lm_usage

        yield f"{target}: load it with checkpoint.load={arguments.out}"
        yield from (f"{name}: {visible(value)}" for name, value in megatron_lm_usage(target).items())

    command = _add(
        commands,
        "conversion.hf_to_megatron",
        advice,
        help="convert a Hugging Face directory to a torch_dist checkpoint, which loads in any parallel layout",
        description="Convert a Hugging Face directory to a torch_dist checkpoint, which loads in any layout.",
        example="--hf /models/Qwen3-8B --out qwen3 --dtype bf16",
        out=_NEW_CHECKPOINT,
        dtype="type of the weights (default: unchanged; FP8 becomes bf16)",
    )
    _directory(command, "--hf", "directory with config.json and weights", required=True)
    _add_allow_non_finite(command)


def _add_megatron_to_hf(commands: Any) -> None:
    def advice(target: Path, arguments: argparse.Namespace) -> Iterator[str]:
        yield f"{target}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"

    command = _add(
        commands,
        "conversion.megatron_to_hf",
        advice,
        help="convert a Megatron checkpoint (torch_dist or legacy) to a Hugging Face directory",
        description="Convert a Megatron checkpoint, torch_dist or legacy, to a directory for transformers and vLLM.\n"
        "Adapters are merged into their base in float32 and rounded once: bf16 can lose small updates, and\n"
        "--dtype fp32 loses none.",
        example="--megatron runs/first --iteration 100 \\\n      --out Qwen3-8B-distilled --hf-config /models/Qwen3-8B",
        out=_NEW_HF,
        dtype="type of the weights (default: unchanged)",
    )
    _add_checkpoint(command)
    _directory(
        command,
        "--hf-config",
        "directory with the original config.json and tokenizer (default: the HF assets of the checkpoint)",
    )
    _add_moved_base(command)
    command.add_argument(
        "--vocab-size", type=int, metavar="N", help="vocabulary without padding, if the checkpoint does not state it"
    )
    command.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        dest="max_shard_bytes",
        help="largest size of a weights file (default: 5GB)",
    )
    _add_allow_non_finite(command)


def _add_gguf_to_hf(commands: Any) -> None:
    def advice(target: Path, arguments: argparse.Namespace) -> Iterator[str]:
        yield f"{target}: convert it with selfdistill convert hf-to-megatron --hf {target} --out NEW_DIRECTORY"

    command = _add(
        commands,
        "gguf.gguf_to_hf",
        advice,
        help="convert a GGUF file to a Hugging Face directory (needs the extra gguf)",
        description="Multiply the weights of a GGUF file out, and write them with config.json and tokenizer.",
        example="--gguf SmolLM2-135M-Instruct.Q4_1.gguf \\\n      --out SmolLM2-135M-Instruct",
        out=_NEW_HF,
        dtype="type of the weights (default: fp32)",
    )
    command.add_argument(
        "--gguf",
        type=Path,
        required=True,
        metavar="FILE",
        dest="file",
        help="one file with weights and tokenizer",
    )
    _add_allow_non_finite(command)


def _add_megatron_to_peft(commands: Any) -> None:
    def advice(target: Path, arguments: argparse.Namespace) -> Iterator[str]:
        yield f"{target}: load it with peft.PeftModel.from_pretrained(model, {str(target)!r})"

    command = _add(
        commands,
        "peft_adapters.megatron_to_peft",
        advice,
        help="convert a checkpoint of adapters to a directory of PEFT",
        description="Write a checkpoint of adapters as a directory for peft.PeftModel.from_pretrained and vLLM.",
        example="--megatron runs/first --out adapters \\\n      --base-model Qwen/Qwen3-8B",
        out="new directory",
        dtype="type of the factors (default: unchanged)",
    )
    _add_checkpoint(command)
    command.add_argument(
        "--base-model",
        metavar="NAME_OR_DIR",
        help="base_model_name_or_path: the Hugging Face model of the base (default: null)",
    )


def _add_peft_to_megatron(commands: Any) -> None:
    def advice(target: Path, arguments: argparse.Namespace) -> Iterator[str]:
        from megatron_selfdistill.checkpoint.formats.stored_adapters import require_adapters

        keys = f"checkpoint.load={arguments.base} adapter.load={arguments.out} {require_adapters(target).overrides()}"
        yield f"{target}: begin a run at it with {keys}"

    command = _add(
        commands,
        "peft_adapters.peft_to_megatron",
        advice,
        help="convert a directory of PEFT to a checkpoint of adapters",
        description="Convert a directory of PEFT to a checkpoint of adapters for adapter.load and evaluations.\n"
        "Modules that Megatron fuses into one layer (q, k, v; gate, up) share one factor A: different A are\n"
        "stacked, which is exact and makes the rank up to three times as large.",
        example="--peft adapters \\\n      --base checkpoints/qwen3-8b --out lora",
        out=_NEW_CHECKPOINT,
        dtype="type of the factors (default: unchanged)",
    )
    _directory(command, "--peft", "directory with adapter_config.json", required=True)
    _directory(command, "--base", "run directory or Megatron checkpoint of the model of these adapters", required=True)


def _add_merge_adapters(commands: Any) -> None:
    def advice(target: Path, arguments: argparse.Namespace) -> Iterator[str]:
        yield f"{target}: load it with checkpoint.load={arguments.out}"

    command = _add(
        commands,
        "merged_weights.merge_adapters",
        advice,
        help="merge a checkpoint of adapters and its base into a full checkpoint",
        description="Write a full torch_dist checkpoint: W + scale * B A, computed in float32 and rounded once.\n"
        "Rounding to bf16 can lose small updates; the output says how many elements stay as they were.\n"
        "For a Hugging Face directory use megatron-to-hf, which merges adapters, too.",
        example="--megatron runs/first --out merged",
        out=_NEW_CHECKPOINT,
    )
    _add_checkpoint(command)
    _add_moved_base(command)
    _add_allow_non_finite(command)
