# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Versions of vLLM: a server finds what 0.33 moved.  No vLLM is needed."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest

from megatron_selfdistill.engines.vllm.server import serve

COMMON = {
    "vllm.entrypoints.common.cli_args": ["make_arg_parser", "validate_parsed_serve_args"],
    "vllm.entrypoints.common.startup": ["cli_env_setup"],
}
LAUNCHERS = {
    "vllm.entrypoints.launchers.cli_args": ["make_arg_parser", "validate_parsed_serve_args"],
    "vllm.entrypoints.serve.utils.api_utils": ["cli_env_setup"],
}


def install(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]], version: str) -> dict[str, ModuleType]:
    """Stand-ins of vLLM's modules with functions of these names; each function returns the name of its module."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    modules: dict[str, ModuleType] = {}
    for full, functions in names.items():
        parts = full.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            module = modules.setdefault(name, ModuleType(name))
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            monkeypatch.setitem(sys.modules, name, module)
            if length > 1:
                setattr(modules[".".join(parts[: length - 1])], parts[length - 1], module)
        for function in functions:
            setattr(modules[full], function, lambda *args, full=full, **options: full)
    modules["vllm"].__version__ = version  # type: ignore[attr-defined]
    return modules


@pytest.mark.parametrize(("names", "version"), [(COMMON, "0.33.0"), (LAUNCHERS, "0.32.0")])
def test_a_server_finds_vllms_command_line_where_the_version_has_it(monkeypatch, names, version):
    install(monkeypatch, {**names, "vllm.entrypoints.common": []}, version)  # the directory is there in both
    found = [function() for function in serve._command_line_of_vllm()]
    arguments, startup = names
    assert found == [arguments, arguments, startup]
