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
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.distributed.terminal import print_error, visible

if TYPE_CHECKING:
    from megatron_selfdistill.interop.release import Progress


EXIT_REFUSED = 2
_RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
Option = dict[str, Any]
"""The arguments of ``add_argument``."""


@dataclass(frozen=True)
class Conversion:
    """A sub-command that converts, with its options."""

    function: str
    """The function, as ``module.name`` in this package; it receives each option under the name of its destination."""
    about: str
    options: dict[str, Option]
    advice: Callable[[Path, argparse.Namespace], str]
    """A function from the new directory and the arguments to the lines that say how to use the directory."""
    example: str
    more: str = ""
    """Further sentences of ``--help``."""

    @property
    def name(self) -> str:
        """The name of the sub-command."""
        return self.function.rpartition(".")[2].replace("_", "-")


def _option(help_text: str, **more: Any) -> Option:
    return {"help": help_text, **more}


def _directory(help_text: str, **more: Any) -> Option:
    return _option(help_text, type=Path, metavar="DIR", **more)


def _dtype(help_text: str) -> dict[str, Option]:
    return {"--dtype": _option(help_text, choices=("bf16", "fp16", "fp32"))}


def _bytes(text: str) -> int:
    """Return the number of bytes of a size such as 5GB or 500MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG])(I?)B?|B?)", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MiB, got {text!r}")
    exponent = "KMG".index(match[2]) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


_NEW_CHECKPOINT = {"--out": _directory("new directory for the checkpoint", required=True)}
_NEW_HF = {"--out": _directory("new Hugging Face directory", required=True)}
_CHECKPOINT = {
    "--megatron": _directory(
        "run directory, or Megatron checkpoint (an iter_ directory, or the one with the tracker file)", required=True
    ),
    "--iteration": _option("iteration to convert (default: the tracker file names it)", type=int, metavar="N"),
}
_MOVED_BASE = {
    "--base": _directory("the base of the adapters, where it has moved (default: where the checkpoint says)")
}


def _adapter_advice(target: Path, given: argparse.Namespace) -> str:
    from megatron_selfdistill.adapters.stored_adapters import require_adapters

    keys = f"checkpoint.load={given.base} adapter.load={given.out} {require_adapters(target).overrides()}"
    return f"{target}: begin a run at it with {keys}"


CONVERSIONS = (
    Conversion(
        "conversion.hf_to_megatron",
        "convert a Hugging Face directory to a torch_dist checkpoint, which loads in any parallel layout",
        {
            **_NEW_CHECKPOINT,
            **_dtype("type of the weights (default: unchanged; FP8 becomes bf16)"),
            "--hf": _directory("directory with config.json and weights", required=True),
        },
        lambda target, given: (
            f"{target}: load it with checkpoint.load={given.out}; `selfdistill convert inspect {given.out}` prints the "
            "flags with which Megatron-LM loads it"
        ),
        "--hf /models/Qwen3-8B --out qwen3 --dtype bf16",
    ),
    Conversion(
        "conversion.megatron_to_hf",
        "convert a Megatron checkpoint (torch_dist or legacy) to a Hugging Face directory",
        {
            **_NEW_HF,
            **_dtype("type of the weights (default: unchanged)"),
            **_CHECKPOINT,
            "--hf-config": _directory(
                "directory with the original config.json and tokenizer (default: the HF assets of the checkpoint)"
            ),
            **_MOVED_BASE,
            "--vocab-size": _option(
                "vocabulary without padding, if the checkpoint does not state it", type=int, metavar="N"
            ),
            "--max-shard-size": _option(
                "largest size of a weights file (default: 5GB)",
                type=_bytes,
                default=5 * 10**9,
                metavar="SIZE",
                dest="max_shard_bytes",
            ),
        },
        lambda target, _: f"{target}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})",
        "--megatron runs/first --iteration 100 \\\n      --out Qwen3-8B-distilled --hf-config /models/Qwen3-8B",
        "Adapters are merged into their base in float32 and rounded once: bf16 can lose small updates, and\n"
        "--dtype fp32 loses none.",
    ),
    Conversion(
        "gguf.gguf_to_hf",
        "convert a GGUF file to a Hugging Face directory (needs the extra gguf)",
        {
            **_NEW_HF,
            **_dtype("type of the weights (default: fp32)"),
            "--gguf": _option(
                "one file with weights and tokenizer", type=Path, metavar="FILE", dest="file", required=True
            ),
        },
        lambda target, _: (
            f"{target}: convert it with selfdistill convert hf-to-megatron --hf {target} --out NEW_DIRECTORY"
        ),
        "--gguf SmolLM2-135M-Instruct.Q4_1.gguf \\\n      --out SmolLM2-135M-Instruct",
    ),
    Conversion(
        "peft_adapters.megatron_to_peft",
        "convert a checkpoint of adapters to a directory of PEFT, which vLLM loads, too",
        {
            "--out": _directory("new directory", required=True),
            **_dtype("type of the factors (default: unchanged)"),
            **_CHECKPOINT,
            "--base-model": _option(
                "base_model_name_or_path: the Hugging Face model of the base (default: null)", metavar="NAME_OR_DIR"
            ),
        },
        lambda target, _: f"{target}: load it with peft.PeftModel.from_pretrained(model, {str(target)!r})",
        "--megatron runs/first --out adapters \\\n      --base-model Qwen/Qwen3-8B",
    ),
    Conversion(
        "peft_adapters.peft_to_megatron",
        "convert a directory of PEFT to a checkpoint of adapters",
        {
            **_NEW_CHECKPOINT,
            **_dtype("type of the factors (default: unchanged)"),
            "--peft": _directory("directory with adapter_config.json", required=True),
            "--base": _directory("run directory or Megatron checkpoint of the model of these adapters", required=True),
        },
        _adapter_advice,
        "--peft adapters \\\n      --base checkpoints/qwen3-8b --out lora",
        "Modules that Megatron fuses into one layer (q, k, v; gate, up) share one factor A: different A are\n"
        "stacked, which is exact and makes the rank up to three times as large.",
    ),
    Conversion(
        "merged_weights.merge_adapters",
        "merge a checkpoint of adapters and its base into a full checkpoint",
        {**_NEW_CHECKPOINT, **_CHECKPOINT, **_MOVED_BASE},
        lambda target, given: f"{target}: load it with checkpoint.load={given.out}",
        "--megatron runs/first --out merged",
        "The weights become W + scale * B A, computed in float32 and rounded once.  Rounding to bf16 can lose\n"
        "small updates; the output says how many elements stay as they were.  For a Hugging Face directory use\n"
        "megatron-to-hf, which merges adapters, too.",
    ),
)


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
        print_error("convert:", f"{error}; nothing was left behind")
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return EXIT_REFUSED


def _check(arguments: argparse.Namespace) -> None:
    """Raise `CheckpointError` for the mistakes in the names of directories that no import of torch has to find."""
    from megatron_selfdistill.checkpoint.formats.directory import is_hugging_face, require_checkpoint
    from megatron_selfdistill.interop.hf_files import require_hugging_face
    from megatron_selfdistill.interop.new_directory import require_free

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
    conversion: Conversion = arguments.conversion
    module, _, name = conversion.function.rpartition(".")
    function = getattr(importlib.import_module(f"megatron_selfdistill.interop.{module}"), name)
    values = {key: value for key, value in vars(arguments).items() if key not in ("run", "conversion")}
    if values.get("dtype") is not None:
        from megatron_selfdistill.interop.conversion import DTYPES

        values["dtype"] = DTYPES[values["dtype"]]
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries would mix with this command's own
    with _progress() as progress:
        target = function(**values, progress=progress)
    print(conversion.advice(target, arguments))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfdistill convert", description=__doc__, **_RAW)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for conversion in CONVERSIONS:
        command = commands.add_parser(
            conversion.name,
            help=conversion.about,
            description=f"{conversion.about[0].upper()}{conversion.about[1:]}.\n{conversion.more}",
            epilog=f"example:\n  selfdistill convert {conversion.name} {conversion.example}",
            **_RAW,
        )
        command.set_defaults(run=_convert, conversion=conversion)
        for name, option in conversion.options.items():
            command.add_argument(name, **option)
    command = commands.add_parser(
        "inspect",
        help="describe a checkpoint or a Hugging Face directory",
        description="Print family, sizes, parallel layout, iteration, parameters, types, true and padded vocabulary.",
        epilog="example:\n  selfdistill convert inspect runs/first",
        **_RAW,
    )
    command.set_defaults(run=_inspect)
    command.add_argument("checkpoint", **_directory("run directory, Megatron checkpoint or Hugging Face directory"))
    return parser
