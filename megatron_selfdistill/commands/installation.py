# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which packages are installed: the project alone brings the loss, which needs torch; all else needs an extra."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.machinery import PathFinder

from megatron_selfdistill import __version__

NEEDED = {"train": {"hydra-core": "hydra", "omegaconf": "omegaconf"}, "report": {"pyyaml": "yaml"}}
"""An extra of setup.py -> the distributions without which its commands do not even show their help -> their modules."""
RUN = {"torch": "torch", "megatron-core": "megatron.core", **NEEDED["train"]}
"""The distributions without which no run starts -> their modules; ``selfdistill doctor`` looks for all others, too."""


class MissingExtraError(ImportError):
    """A use of the project that needs an extra whose packages are not installed; the message is one sentence."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of ``extra``, for a message."""
    return f"pip install -e '.[{extra}]' in a clone of this project"


def about_missing(user: str, modules: Mapping[str, str], extra: str = "train") -> str | None:
    """Return the sentence that says what the ``user`` lacks and which extra installs it; None if nothing is missing.

    modules: distribution -> module, none of which is imported.
    """
    missing = [name for name, module in modules.items() if not is_installed(module)]
    if not missing:
        return None
    return (
        f"{user} needs {' and '.join(missing)}, which this Python lacks: run {install_command(extra)} "
        "(megatron_selfdistill.loss needs no more than torch)."
    )


def require_extra(user: str, extra: str) -> None:
    """Raise `MissingExtraError`, before imports that would fail, if the packages of ``extra`` are not installed.

    user: what needs the packages, a name for the message.  For ``__main__`` the function prints the message and exits
    with 2, since the exception would print a traceback.
    """
    message = about_missing(sys.argv[0] if user == "__main__" else user, NEEDED[extra], extra)
    if message is None:
        return
    if user != "__main__":
        raise MissingExtraError(message)
    print(message, file=sys.stderr)
    sys.exit(2)


def is_installed(module: str) -> bool:
    """Return whether this process has ``module``, as far as can be said without the import."""
    if module in sys.modules:
        return True
    package = module.rpartition(".")[0]
    if package:  # the search for a submodule would import its package
        around = importlib.util.find_spec(package)
        found = PathFinder.find_spec(module, around.submodule_search_locations) if around is not None else None
    else:
        found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None  # a directory of data with this name has no origin


def version() -> str:
    """Return the versions of this package, torch, megatron-core and Python; torch is not imported."""
    return "\n".join(
        [
            f"megatron_selfdistill {__version__}",
            *(f"{name} {installed_version(name) or 'is not installed'}" for name in ("torch", "megatron-core")),
            f"Python {sys.version.split()[0]}",
        ]
    )


def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
