# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The functions of users that keys name by a dotted path, and the one wrapper of every call of a user's code."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from megatron_selfdistill.errors import CheckpointError, ConfigError, EngineError, ProgramEndError, VerifierError

FOR_THE_USER = (ConfigError, CheckpointError, EngineError, VerifierError, ProgramEndError)
"""The exceptions whose messages name a key or a file already."""


def function_named(
    key: str, name: str, built_in: Mapping[str, Callable[..., Any]], error: type[Exception] | None = None
) -> Callable[..., Any]:
    """Return the function ``name`` of ``built_in``, or import the function with the dotted path ``name``.

    ``key`` is the key of the configuration with the value ``name``, for messages.  A call of an imported function
    is wrapped in `user_code`, which takes ``error``.  The methods of what it returns need `user_code`, too.

    Raises: `ConfigError` if there is no such function.
    """
    if name in built_in:
        return built_in[name]
    function = imported(key, name, "function", [*built_in])
    return user_code(f"{key}={name}", error)(function)  # type: ignore[no-any-return]


def imported(key: str, name: str, kind: str, choices: Sequence[str] = ()) -> Any:
    """Return the function or class with the dotted path ``name``.

    ``key`` is the key of the configuration with the value ``name``; ``kind`` is "function" or "class", and ``choices``
    are the other values of the key, all for messages.

    Raises: `ConfigError` if it cannot be imported, or is not callable.
    """
    others = f"{', '.join(choices)} or " if choices else ""
    path = "package.module.Class" if kind == "class" else "package.module.function"
    expected = f"{key} must be {others}the dotted path of a {kind} ({path}), got {name!r}"
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ConfigError(expected)
    try:
        with user_code(f"the import of {module_name}"):
            found = getattr(importlib.import_module(module_name), attribute)
    except ProgramEndError as error:
        raise ConfigError(f"{key}={name}: {error}") from error
    except ImportError as error:
        raise ConfigError(
            f"{expected}; {module_name} cannot be imported: {error}; put its directory on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{expected}; {error}") from error
    if not callable(found):
        raise ConfigError(f"{expected}, which is a {type(found).__name__}")
    return found


@contextlib.contextmanager
def user_code(name: str, error: type[Exception] | None = None) -> Iterator[None]:
    """Run code of a user, which ``name`` describes, so that it cannot end the program; also a decorator.

    ``sys.exit(0)`` in a reward function would end one rank, with the status of success, while the others wait for it.
    The end that a signal has asked for passes, and so does an exception of type Exception without ``error``.

    Raises: ``error``, whose message is a line with ``name`` and the exception, and below it the lines of the user's
    code, in place of an Exception that is no message for the user yet; `ProgramEndError` in place of SystemExit,
    KeyboardInterrupt and every other exception that is no Exception.
    """
    try:
        yield
    except Exception as raised:
        if error is None or isinstance(raised, FOR_THE_USER):
            raise
        raise error(f"{name} failed with {type(raised).__name__}: {raised}{own_lines(raised)}") from raised
    except BaseException as end:
        if _comes_from_a_signal(end):
            raise
        raise ProgramEndError(
            f"{name} tried to end the program with {end!r}: raise an exception that says what is wrong instead"
        ) from end


def own_lines(error: BaseException) -> str:
    """Return the part of an error's traceback that is in code of a user, below a line end; "" if there is none."""
    own = dropwhile(lambda frame: _is_between(frame.filename), traceback.extract_tb(error.__traceback__))
    return "".join(["\n", *traceback.format_list([*own])]).rstrip()


def _is_between(file: str) -> bool:
    """Return whether ``file`` is of this package or of Python's own library, through which code of a user is called."""
    return file.startswith(_PACKAGE) or (file.startswith(_LIBRARY) and "-packages/" not in file)


_PACKAGE, _LIBRARY = f"{Path(__file__).resolve().parents[1]}/", f"{Path(contextlib.__file__).parent}/"


def _comes_from_a_signal(end: BaseException) -> bool:
    """Return whether a signal may have raised ``end``: Python runs handlers in the main thread, in any code."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(end, KeyboardInterrupt):
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(end, SystemExit) and end.code == 128 + signal.SIGTERM  # so commands end on SIGTERM
