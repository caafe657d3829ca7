# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Texts for a terminal: names in foreign files, which messages quote, cannot steer the terminal of the reader.

Warnings of Megatron Core and torch that do not help users are silenced; each rank would print a screen of them.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import unicodedata
import warnings
from typing import Any

from megatron_selfdistill.hidden_values import hidden

_MESSAGES = (
    # The first lines of a run say which layers are in use.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    # Megatron's use of older names of Megatron and torch.
    "full scope is deprecated",
    "`torch.distributed.",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "TypedStorage is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    # Set in distributed/ranks.py, where it matters.
    "When using async grad allreduce",
    # The converter writes checkpoints from a single process on purpose.
    "torch.distributed is disabled, unavailable or uninitialized",
)


def visible(text: str) -> str:
    """Return ``text`` with control characters, which could steer a terminal, as escapes; line ends and tabs remain."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def print_error(speaker: str, error: object) -> None:
    """Print the message of ``error`` behind ``speaker`` on standard error, without values from the environment."""
    print(f"{speaker} {visible(hidden(str(error)))}", file=sys.stderr, flush=True)


def guard_standard_error() -> None:
    """Let this process print warnings and tracebacks as `print_error` prints errors, unless other code handles them."""
    assert logging.lastResort is not None, "Python prints warnings without a handler of their own"
    logging.lastResort.setFormatter(_VisibleFormatter())
    sys.excepthook = _print_traceback


def _print_traceback(*error: Any) -> None:
    print(visible(hidden("".join(traceback.format_exception(*error)))), end="", file=sys.stderr, flush=True)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(hidden(super().format(record)))


def _steers(character: str) -> bool:
    """Return whether ``character`` is a control character, a mark of text direction or half of a surrogate pair.

    The result is False for a joiner of letters.
    """
    return character not in "\n\t\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs")


def silence_known_warnings() -> None:
    """Silence the known warnings, in a command before it imports Megatron; other warnings stay."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=re.escape(message))
