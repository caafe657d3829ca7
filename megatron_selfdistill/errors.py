# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The exceptions whose message is for the user: it states what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

_NUM_SHOWN = 4


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key."""


class BadRecordError(ValueError):
    """A record of a data set that cannot be used.

    The message names the field, and the reader adds file and line.  The message does not quote the record.
    """

    def __init__(self, message: str, content: object = None) -> None:
        super().__init__(message)
        self.content = content
        """The part of the record that the message is about, for users who may see it; None is no part."""


class MissingChatTemplateError(ValueError):
    """A tokenizer without a chat template, in a run whose configuration gives none either."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The tokenizer {name} has no chat template: set data.chat_template, for a model without chat "
            "roles to '{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}'."
        )


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, corrupt or of another model."""


class EngineError(Exception):
    """A rollout engine that has failed; the run uses no response of the failed step."""


class ProgramEndError(RuntimeError):
    """An attempt of code that a run has called to end the program; the message names the code."""


class VerifierError(RuntimeError):
    """A verifier that has raised an exception; the message names the problem and the exception."""


OF_ALL_RANKS: tuple[type[Exception], ...] = (ConfigError, CheckpointError, EngineError, VerifierError)
"""The exceptions that all ranks raise alike, with one message."""


def first_few(texts: Sequence[str], separator: str = "; ") -> str:
    """Return the first four of ``texts`` and the number of the others, for a message: ``a; b; c; d; and 2 more``."""
    shown = list(texts[:_NUM_SHOWN])
    if len(texts) > _NUM_SHOWN:
        shown.append(f"and {len(texts) - _NUM_SHOWN} more")
    return separator.join(shown)
