# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The vLLM of this environment has every name that the package uses, and guided engines refuse another version."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm
from scripts import load_script

from megatron_selfdistill.rollout.vllm.plugin.guided_processor import refuse_settings
from megatron_selfdistill.rollout.vllm.server import serve


def test_every_name_that_is_used_is_there():
    names = load_script(Path(__file__).resolve().parents[3] / "tools" / "vllm_names.py")
    root = names.installed("vllm")
    assert root is not None and names.version_of(root) == vllm.__version__
    assert names.missing(root) == []


def test_a_server_finds_vllms_command_line():
    names = [function.__name__ for function in serve._command_line_of_vllm()]
    assert names == ["make_arg_parser", "validate_parsed_serve_args", "cli_env_setup"]


def test_the_guided_processor_refuses_a_version_on_which_it_has_not_run(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(ValueError, match=r"has run on vLLM 0\.32 and not yet on 0\.33\.0"):
        refuse_settings(None)
