# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert Hugging Face directories to Megatron checkpoints and back, adapters too, and describe them.

    selfdistill convert hf-to-megatron --hf /models/Qwen3-8B --out qwen3
    selfdistill checkpoint.load=qwen3 data.tokenizer=/models/Qwen3-8B data.path=problems.jsonl run_dir=runs/first
    selfdistill convert megatron-to-hf --megatron runs/first --out Qwen3-8B-distilled
    selfdistill convert inspect runs/first

The command runs in one process and needs no GPU.  It takes about twice the memory of the largest tensor, for a model of
any size; megatron-to-hf also holds one file of weights (--max-shard-size).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
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
_RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
_DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 after a message about bad input."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that partial files are removed
    # --help and a mistyped option do not wait for these imports.
    from megatron_selfdistill.distributed.terminal import silence_known_warnings
    from megatron_selfdistill.errors import CheckpointError, ConfigError

    silence_known_warnings()
    try:
        return int(arguments.run(arguments))
    except (CheckpointError, ConfigError) as error:
        print_error("convert:", error)
    except OSError as error:
        print_error("convert:", f"{error}; nothing was left behind")
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return EXIT_REFUSED


def _convert(arguments: argparse.Namespace) -> int:
    module, _, name = arguments.function.rpartition(".")
    function = getattr(importlib.import_module(f"megatron_selfdistill.interop.{module}"), name)
    values = {key: value for key, value in vars(arguments).items() if key not in ("run", "function", "advice")}
    if values["dtype"] is not None:
        from megatron_selfdistill.interop.conversion import DTYPES

        values["dtype"] = DTYPES[values["dtype"]]
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries would mix with this command's own
    with _progress() as progress:
        target = function(**values, progress=progress)
    print(f"{target}: {arguments.advice(target, arguments)}")
    return 0


def _adapter_advice(target: Path, given: argparse.Namespace) -> str:
    from megatron_selfdistill.adapters.stored_adapters import require_adapters

    settings = require_adapters(target).overrides()
    return f"begin a run at it with checkpoint.load={given.base} adapter.load={given.out} {settings}"


def _inspect(arguments: argparse.Namespace) -> int:
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

    def conversion(
        function: str, about: str, advice: Callable[[Path, argparse.Namespace], str], example: str, more: str = ""
    ) -> argparse.ArgumentParser:
        """Add the sub-command that calls ``function``, which receives each option under the name of its destination."""
        name = function.rpartition(".")[2].replace("_", "-")
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.\n{more}",
            epilog=f"example:\n  selfdistill convert {name} {example}",
            **_RAW,
        )
        command.set_defaults(run=_convert, function=function, advice=advice)
        command.add_argument("--out", required=True, help="new directory", **_DIR)
        command.add_argument(
            "--dtype", choices=("bf16", "fp16", "fp32"), help="type of the tensors (default: unchanged)"
        )
        return command

    from_hf = conversion(
        "conversion.hf_to_megatron",
        "convert a Hugging Face directory to a torch_dist checkpoint, which loads in any parallel layout",
        lambda _, given: f"load it with checkpoint.load={given.out}",
        "--hf /models/Qwen3-8B --out qwen3 --dtype bf16",
        "FP8 and MXFP4 become bf16.",
    )
    to_hf = conversion(
        "conversion.megatron_to_hf",
        "convert a Megatron checkpoint (torch_dist or legacy) to a Hugging Face directory",
        lambda target, _: f"load it with transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})",
        "--megatron runs/first --iteration 100 \\\n      --out Qwen3-8B-distilled --hf-config /models/Qwen3-8B",
    )
    to_peft = conversion(
        "peft_adapters.megatron_to_peft",
        "convert a checkpoint of adapters to a directory of PEFT, which vLLM loads, too",
        lambda target, _: f"load it with peft.PeftModel.from_pretrained(model, {str(target)!r})",
        "--megatron runs/first --out adapters \\\n      --base-model Qwen/Qwen3-8B",
    )
    from_peft = conversion(
        "peft_adapters.peft_to_megatron",
        "convert a directory of PEFT to a checkpoint of adapters",
        _adapter_advice,
        "--peft adapters \\\n      --base checkpoints/qwen3-8b --out lora",
        "Modules that Megatron fuses into one layer (q, k, v; gate, up) share one factor A: different A are\n"
        "stacked, which is exact and makes the rank up to three times as large.",
    )
    from_hf.add_argument("--hf", required=True, help="directory with config.json and weights", **_DIR)
    for command in (to_hf, to_peft):
        about = "run directory, or Megatron checkpoint (an iter_ directory, or the one with the tracker file)"
        command.add_argument("--megatron", required=True, help=about, **_DIR)
        about = "iteration to convert (default: the tracker file names it)"
        command.add_argument("--iteration", type=int, metavar="N", help=about)
    about = "directory with the original config.json and tokenizer (default: the HF assets of the checkpoint)"
    to_hf.add_argument("--hf-config", help=about, **_DIR)
    about = "vocabulary without padding, if the checkpoint does not state it"
    to_hf.add_argument("--vocab-size", type=int, metavar="N", help=about)
    about = "most bytes of tensors in a weights file, such as 500MB (default: 5GB)"
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=about)
    about = "base_model_name_or_path: the Hugging Face model of the base (default: null)"
    to_peft.add_argument("--base-model", metavar="NAME_OR_DIR", help=about)
    from_peft.add_argument("--peft", required=True, help="directory with adapter_config.json", **_DIR)
    about = "run directory or Megatron checkpoint of the model of these adapters"
    from_peft.add_argument("--base", required=True, help=about, **_DIR)
    inspect = commands.add_parser(
        "inspect",
        help="describe a checkpoint or a Hugging Face directory",
        description="Print family, sizes, parallel layout, iteration, parameters, types, true and padded vocabulary.",
        epilog="example:\n  selfdistill convert inspect runs/first",
        **_RAW,
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("checkpoint", help="run directory, Megatron checkpoint or Hugging Face directory", **_DIR)
    return parser
