# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Versions of vLLM: where guided rollouts are refused, and where a server finds what 0.33 moved.  No vLLM is needed."""

from __future__ import annotations

import importlib.machinery
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.rollout.vllm import in_process
from megatron_selfdistill.rollout.vllm.pairs import why_not_guided
from megatron_selfdistill.rollout.vllm.server import serve

COMMON = {
    "vllm.entrypoints.common.cli_args": ["make_arg_parser", "validate_parsed_serve_args"],
    "vllm.entrypoints.common.startup": ["cli_env_setup"],
}
LAUNCHERS = {
    "vllm.entrypoints.launchers.cli_args": ["make_arg_parser", "validate_parsed_serve_args"],
    "vllm.entrypoints.serve.utils.api_utils": ["cli_env_setup"],
}
REFUSAL = r"rollout\.guidance=mixed has run on vLLM 0\.32 and not yet on 0\.33\.0"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4", "0.32.1+cu130"])
def test_guided_rollouts_run_on_the_version_that_they_have_run_on(version):
    assert why_not_guided(version) is None


@pytest.mark.parametrize("version", ["0.33.0", "0.31.2", "0.320.0", "1.32.0", "dev"])
def test_guided_rollouts_are_refused_on_any_other_version(version):
    assert f"not yet on {version}" in (why_not_guided(version) or "")


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


def test_a_server_for_guided_requests_is_refused_before_vllm_reads_anything(monkeypatch, capsys):
    others = {
        "vllm.entrypoints.launchers.api_server.entry": ["run_server"],
        "vllm.platforms": ["current_platform"],
        "vllm.utils.argparse_utils": ["FlexibleArgumentParser"],
    }
    install(monkeypatch, {**COMMON, **others}, "0.33.0")
    monkeypatch.setitem(sys.modules, "uvloop", ModuleType("uvloop"))
    monkeypatch.setattr(serve, "_set_environment", lambda options: None)
    with pytest.raises(SystemExit) as ended:
        serve.main(["--hf-config=/model", "--guided"])
    assert ended.value.code == 2 and re.search(REFUSAL, capsys.readouterr().err)


def test_a_colocated_engine_for_guided_requests_is_refused_before_it_is_built(monkeypatch):
    names = {"vllm": ["LLM"], "vllm.v1.executor.uniproc_executor": ["ExecutorWithExternalLauncher"]}
    modules = install(monkeypatch, names, "0.33.0")

    def build(*args: Any, **options: Any) -> None:
        raise AssertionError("vLLM was started")

    modules["vllm"].LLM = build  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=REFUSAL):
        in_process._started(Path("/model"), {}, 0, 0, "ident", guided=True)
