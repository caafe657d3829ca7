# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The vLLM of this environment has every name that the package uses."""

from __future__ import annotations

from pathlib import Path

import vllm
from scripts import load_script

from megatron_selfdistill.engines.vllm.server import serve


def test_every_name_that_is_used_is_there():
    names = load_script(Path(__file__).resolve().parents[3] / "tools" / "vllm_names.py")
    root = names.installed("vllm")
    assert root is not None and names.version_of(root) == vllm.__version__
    assert names.missing(root) == []


def test_a_server_finds_vllms_command_line():
    names = [function.__name__ for function in serve._command_line_of_vllm()]
    assert names == ["make_arg_parser", "validate_parsed_serve_args", "cli_env_setup"]
