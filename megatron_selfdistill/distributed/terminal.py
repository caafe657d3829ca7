# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Texts that are shown: names in foreign files cannot steer the reader's terminal.

Warnings of Megatron Core and torch that do not help users are silenced; each rank would print a screen of them.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import traceback
import unicodedata
import warnings
from typing import Any

_MESSAGES = (
    # The first lines of a run say which layers are in use.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    # Megatron's use of older names of Megatron and torch.
    "full scope is deprecated",
    "`torch.distributed.",
    "`load_state_dict` is deprecated",
    "The argument order of load ",
    "Please use DTensor instead",
    "TypedStorage is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    # Choices of this program: its models, their order of parameters, and Megatron's own writer of checkpoints.
    "GPTModel IS DEPRECATED",
    "DistributedDataParallel: full_param_layout not provided",
    "MCore's async save is deprecated",
    # What Megatron imports and this program does not use.
    "MimoModelConfig is experimental",
    # Set in distributed/ranks.py, where it matters.
    "When using async grad allreduce",
    # The converter writes checkpoints from a single process on purpose.
    "torch.distributed is disabled, unavailable or uninitialized",
)


def visible(text: str) -> str:
    """Return ``text`` with control characters, which could steer a terminal, as escapes; line ends and tabs remain."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def print_error(speaker: str, error: object) -> None:
    """Print the message of ``error`` behind ``speaker`` on standard error."""
    print(f"{speaker} {visible(str(error))}", file=sys.stderr, flush=True)


def guard_standard_error() -> None:
    """Let this process print warnings and tracebacks as `print_error` prints errors, unless other code handles them.

    A reader of standard output or standard error that ends, such as a killed ``tee``, then costs nothing but its text.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            buffered = io.BufferedWriter(_Pipe(descriptor, "w", closefd=False))
            text = io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, text)
    assert logging.lastResort is not None, "Python prints warnings without a handler of their own"
    logging.lastResort.setFormatter(_VisibleFormatter())
    sys.excepthook = _print_traceback


class _Pipe(io.FileIO):
    """A descriptor that leads to nowhere as soon as nobody can read what is written, for all writers of the process."""

    def write(self, data: Any) -> int:
        """Write bytes and return their number."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # such as a full disk, which loses what a command computed
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return len(data)


def _print_traceback(*error: Any) -> None:
    print(visible("".join(traceback.format_exception(*error))), end="", file=sys.stderr, flush=True)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _steers(character: str) -> bool:
    """Return whether ``character`` is a control character, a mark of text direction or half of a surrogate pair.

    The result is False for a joiner of letters.
    """
    return character not in "\n\t\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs")


def silence_known_warnings() -> None:
    """Silence the known warnings, in a command before it imports Megatron; other warnings stay."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=re.escape(message))
    if logging.lastResort is not None:
        logging.lastResort.addFilter(lambda record: not record.getMessage().startswith(_MESSAGES))
    # A machine with CUDA's compiler and without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
