# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/vllm_names.py: it knows what the package imports of vLLM, and notices what a version lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load_script

vllm_names = load_script(Path(__file__).resolve().parents[3] / "tools" / "vllm_names.py")

FILES = {
    "__init__.py": "LAZY = {'SamplingParams': '.sampling_params:SamplingParams'}",
    "_version.py": "__version__ = version = '0.40.1'",
    "distributed/__init__.py": "from .parallel_state import *",
    "distributed/parallel_state.py": "def get_tp_group(): ...\ndef unused():\n    hidden = 1",
    "entrypoints/common/cli_args.py": "def make_arg_parser(): ...\nclass Args:\n    host: str = ''",
    "entrypoints/serve/routes.py": "router.get('/health')\nrouter.post(\"/pause\")",
    "engine/arg_utils.py": "class EngineArgs:\n    dtype: str = 'auto'\nadd_argument(\"--headless\")",
    "envs.py": 'VARIABLES = {"VLLM_HOST_IP": None}',
    "v1/worker/gpu_worker.py": (
        "class Worker:\n    def reload_weights(self):\n        self._weight_update_active = local = 1"
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "entry",
    [
        "import vllm.SamplingParams",
        "import vllm.distributed.get_tp_group",  # through a star
        "import vllm.entrypoints.launchers.cli_args.make_arg_parser",  # where 0.33 has it
        "import vllm.v1.worker.gpu_worker",
        "member vllm.v1.worker.gpu_worker.Worker.reload_weights",
        "member vllm.v1.worker.gpu_worker.Worker._weight_update_active",
        "argument dtype",
        "argument host",
        "argument headless",
        "environment VLLM_HOST_IP",
        "route /pause",
    ],
)
def test_what_a_version_has_is_found(root, entry):
    assert vllm_names.has(root, entry)


@pytest.mark.parametrize(
    "entry",
    [
        "import vllm.v1.worker.utils.request_memory",
        "import vllm.distributed.get_pp_group",
        "import vllm.entrypoints.launchers.cli_args.validate_parsed_serve_args",
        "member vllm.distributed.parallel_state.hidden",
        "member vllm.v1.worker.gpu_worker.Worker.local",
        "member vllm.v1.worker.gpu_worker.Engine.reload_weights",
        "argument max_model_len",
        "environment VLLM_HOST",
        "route /resume",
        "route /heal",
    ],
)
def test_what_a_version_lacks_is_noticed(root, entry):
    assert not vllm_names.has(root, entry)


def test_all_that_the_package_imports_is_looked_for():
    imported = vllm_names.imported_names("vllm")
    assert {"vllm.SamplingParams", "vllm.LLM", "vllm.platforms.current_platform"} <= set(imported)
    assert "vllm.lora.request.LoRARequest" in imported and not any("megatron" in name for name in imported)
    assert {f"import {name}" for name in imported} <= set(vllm_names.names())


def test_a_table_names_the_version_and_what_is_missing(root, capsys):
    assert vllm_names.main([str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name | 0.40.1"
    assert "argument dtype | yes" in lines and "argument max_model_len | MISSING" in lines
    assert vllm_names.main([str(root / "vllm")]) == 2
