# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The optional packages of a configuration: which ones, in which environment, and what a run without them says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_selfdistill import prechecks, train
from megatron_selfdistill.checkpoint import resumption
from megatron_selfdistill.compat import cpu
from megatron_selfdistill.config import load
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.formats import stored_model
from megatron_selfdistill.prechecks import about_packages, needed_packages, require_packages

SERVERS = ("rollout.engine=vllm", "rollout.placement=server")
LATENT = ("model=deepseek_v3",)
CUT = (*LATENT, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
GATED = ("+model.transformer={experimental_attention_variant: gated_delta_net}",)
LOGGED = ("recipe=chat_logs", "rollout.engine=vllm")
CASES = {
    "the default": ([], []),
    "vLLM in the trainer": (["rollout.engine=vllm"], [("vllm", True)]),
    "servers that run": ([*SERVERS, "rollout.servers=[http://n1:8000]"], [("vllm", False)]),
    "servers of another Python": ([*SERVERS, "rollout.num_servers=1", "rollout.server_python=p"], [("vllm", False)]),
    "servers of this Python": ([*SERVERS, "rollout.num_servers=1"], [("vllm", True)]),
    "logged responses, nothing sampled": (LOGGED, []),
    "logged responses, evaluated": ([*LOGGED, "evaluation.path=a", "evaluation.every=5"], [("vllm", True)]),
    "latent attention": (LATENT, []),
    "latent attention, cut": (CUT, [("transformer_engine", True)]),
    "gated delta nets": (GATED, [("fla", False)]),
    "gated delta nets in PyTorch": ([*GATED, "+model.transformer.deterministic_mode=true"], []),
    "layers in FP8": (["+model.transformer.fp8=hybrid"], [("transformer_engine", True)]),
}


@pytest.fixture
def absent(monkeypatch):
    """Hide the optional packages of the machine that runs the tests."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("vllm", "transformer_engine", "fla"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_needs_the_packages_of_what_it_sets(name):
    overrides, expected = CASES[name]
    assert [(it.module, it.is_here) for it in needed_packages(load(list(overrides)))] == expected


def test_every_extra_that_a_message_names_is_one_of_the_installation():
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text(encoding="utf-8")
    for overrides, _ in CASES.values():
        for it in needed_packages(load(list(overrides))):
            distribution = {"fla": "flash-linear-attention"}.get(it.module, it.module.replace("_", "-"))
            assert re.search(rf'^    "{it.extra}": \[\s*["\']{distribution}\b', setup, re.MULTILINE)
            assert f"pip install -e '.[{it.extra}]'" in it.remedy


def test_a_missing_package_is_one_message_before_anything_is_built(absent, capsys):
    assert train.main(["rollout.engine=vllm", "data.path=none.jsonl", "data.tokenizer=none", "run_dir=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.engine=vllm with rollout.placement=colocated needs vLLM in the trainer's own environment" in line
    assert "pip install -e '.[vllm]' in a clone of this project, or set rollout.engine=megatron" in line


def test_a_package_of_every_run_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(prechecks, "RUN", {"megatron-core": "megatron.absent"})
    with pytest.raises(ConfigError, match=r"a run needs megatron-core, .*: run pip install -e '\.\[train\]'"):
        require_packages(load([]))


def test_a_package_that_is_there_or_that_only_a_server_needs_is_not_missed(absent, monkeypatch):
    require_packages(load([*SERVERS, "rollout.servers=[http://n1:8000]"]))
    config = load(["rollout.engine=vllm"])
    with pytest.raises(ConfigError, match="needs vLLM"):
        require_packages(config)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    require_packages(config)


def test_a_plan_says_what_to_install_and_whether_it_is_here(absent):
    (line,) = about_packages(load(["recipe=qwen3_8b"]))
    assert line.startswith("needs vLLM in the trainer's own environment, because of rollout.engine=vllm with")
    assert "pip install -e '.[vllm]'" in line and "(this machine has no vLLM)" in line
    assert line.endswith("Transformer Engine is used on GPUs if it is installed, and not needed")
    (line,) = about_packages(load([]))
    assert line.startswith("needs no optional package; Transformer Engine is used")
    (line,) = about_packages(load(list(CUT)))
    assert re.search(r"needs Transformer Engine .*'\.\[te\]'", line) and "not needed" not in line


def test_gated_delta_nets_need_their_kernels_on_a_gpu_only(absent, monkeypatch):
    config = load(list(GATED))
    require_packages(config)
    (line,) = about_packages(config)
    assert line.startswith(
        "needs flash-linear-attention in the trainer's own environment, because of the computation of gated"
    )
    assert "'.[gdn]'" in line and "(this machine has no" not in line
    monkeypatch.setattr(cpu, "ON_CPU", False)
    (line,) = about_packages(config)
    assert "(this machine has no flash-linear-attention)" in line
    with pytest.raises(ConfigError, match=r"'\.\[gdn\]' .* or set model\.transformer\.deterministic_mode=true"):
        require_packages(config)
    require_packages(load([*GATED, "+model.transformer.deterministic_mode=true"]))


def test_the_architecture_of_a_checkpoint_needs_its_packages_before_data_is_read(absent, monkeypatch):
    monkeypatch.setattr(cpu, "ON_CPU", False)
    monkeypatch.setattr(resumption, "refuse_another_run", lambda config, given: None)
    monkeypatch.setattr(stored_model, "with_stored_architecture", lambda config, given: load(list(GATED)))
    with pytest.raises(ConfigError, match="gated delta nets on GPUs needs flash-linear-attention in the trainer's own"):
        train._check_and_train(load([]), None, None, None)
