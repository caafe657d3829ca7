# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Servers that a run starts: their environment and arguments, and the message if a server does not start."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from events import wait_until

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.server import serve, server_process
from megatron_selfdistill.engines.vllm.server.server_names import PARENT_VARIABLE, TOKEN_VARIABLE
from megatron_selfdistill.engines.vllm.server.server_process import (
    ServerProcess,
    server_environment,
    start_servers,
    wait_until_healthy,
)
from megatron_selfdistill.errors import ConfigError, EngineError

MIDDLEWARE = {"middleware": ["a", "b"], "compilation_config": {"level": 0}}
OF_SERVERS = ("server.serve", "plugin.middleware", "protocol")


def started(directory: Path, python: Path, environment: dict[str, str] | None = None) -> list[ServerProcess]:
    return start_servers(
        RolloutConfig(
            engine="vllm",
            placement="server",
            num_servers=1,
            server_python=str(python),
            server_env=environment or {},
            engine_tp=2,
            kv_cache_gb=0.5,
            engine_args={"max_num_seqs": 8, "enable_prefix_caching": False, **MIDDLEWARE},
        ),
        directory=directory / "servers",
        hf_config=directory,
        token="secret",
        dtype=torch.bfloat16,
        max_model_len=77,
    )


def script(directory: Path, text: str) -> Path:
    """Return a program that stands in for Python: it runs the shell script ``text``, whatever its arguments."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_server_gets_all_settings_and_its_command_holds_no_secret(tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "PYTHONHOME", "SOME_SWITCH"):
        monkeypatch.setenv(name, "7")
    own = {"NCCL_DEBUG": "INFO", "SOME_SWITCH": "", TOKEN_VARIABLE: "another"}
    [one] = started(tmp_path, script(tmp_path, 'echo "$@"; env'), environment=own)
    one.process.wait()
    command, *environment = one.log.read_text().splitlines()
    assert command == (
        f"-m megatron_selfdistill.engines.vllm.server.serve --port={one.address.rpartition(':')[2]} "
        f"--hf-config={tmp_path} "
        "--tensor-parallel-size=2 --dtype=bfloat16 --max-model-len=77 --kv-cache-gb=0.5 -- "
        '--max-num-seqs=8 --no-enable-prefix-caching --middleware a b --compilation-config={"level": 0}'
    )
    variables = dict(line.partition("=")[::2] for line in environment)
    assert variables[TOKEN_VARIABLE] == "secret" and variables[PARENT_VARIABLE] == str(os.getpid())
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONHOME", "SOME_SWITCH"} & set(variables)
    assert variables["NCCL_DEBUG"] == "INFO"
    assert [path.name for path in Path(variables["PYTHONPATH"]).iterdir()] == ["megatron_selfdistill"]


USERS = {"HOME": "/home/me", "NCCL_SOCKET_IFNAME": "eth0", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
TORCHRUNS = {"RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0", "TORCHELASTIC_RUN_ID": "1"}
TRAINERS = {
    **{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    **{"NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"},
}
LAUNCHED = {"LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("at_start", "now", "kept"),
    [
        (USERS | TORCHRUNS | {"OMP_NUM_THREADS": "1"}, TRAINERS | {"SLURM_JOB_ID": "4"}, USERS | {"SLURM_JOB_ID": "4"}),
        ({"OMP_NUM_THREADS": "1"}, {}, {"OMP_NUM_THREADS": "1"}),  # started without torchrun
        ({"OMP_NUM_THREADS": "12"} | LAUNCHED, {}, {"OMP_NUM_THREADS": "12"}),
        ({"OMP_NUM_THREADS": "1"} | LAUNCHED, {}, {}),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, {}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ],
)
def test_a_server_inherits_what_the_user_exported_and_not_what_the_trainer_or_torchrun_set(at_start, now, kept):
    assert server_environment(at_start | now, at_start) == kept


@pytest.mark.full
def test_a_process_knows_what_it_was_started_with():
    code = (
        "import os; os.environ['NCCL_DEBUG'] = 'INFO'; os.environ['NCCL_ALGO'] = 'Ring';"
        "from megatron_selfdistill.engines.vllm.server.server_process import environment_at_start, server_environment;"
        "made = server_environment(os.environ, environment_at_start());"
        "print(made.get('NCCL_DEBUG'), made.get('NCCL_ALGO'))"
    )
    environment = {**os.environ, "NCCL_DEBUG": "WARN"}
    environment.pop("NCCL_ALGO", None)  # a self-test in this process sets it
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["WARN", "None"]


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(tmp_path):
    [one] = started(tmp_path, script(tmp_path, "echo no module named vllm >&2; exit 3"))
    with pytest.raises(EngineError, match=r"(?s)ended with status 3 .*0\.log:\nno module named vllm"):
        wait_until_healthy([one], [VllmServer(one.address)], 3600)


def test_a_server_that_does_not_come_up_is_an_error_in_time(tmp_path):
    [one] = started(tmp_path, script(tmp_path, "exec sleep 600"))
    with pytest.raises(EngineError, match=r"is up after 0\.5 s .*0\.log"):
        wait_until_healthy([one], [VllmServer(one.address)], 0.5)
    one.stop()
    assert one.process.returncode is not None


def test_the_children_of_a_server_end_with_it_also_when_it_was_killed(tmp_path):
    [one] = started(tmp_path, script(tmp_path, "sleep 600 & echo child $!; wait"))
    child = wait_until(lambda: re.search(r"child (\d+)\n", one.log.read_text()))[1]
    one.process.kill()
    one.process.wait()
    one.stop()
    state = Path(f"/proc/{child}/stat")
    wait_until(lambda: not state.exists() or " Z " in state.read_text())


@pytest.mark.parametrize(
    ("count", "each", "visible", "wanted"),
    [(2, 2, "0,1,2,3,4,5", ["2,3", "4,5"]), (1, 1, "4,7,9", ["9"]), (2, 2, "0,1,2,3", None)],
)
def test_servers_get_the_gpus_behind_the_trainers(monkeypatch, count, each, visible, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if wanted is None:
        with pytest.raises(ConfigError, match="need 4 besides the 2 of the trainer, but this machine has 4"):
            server_process._gpus_of_servers(count, each)
    else:
        assert server_process._gpus_of_servers(count, each) == wanted


@pytest.mark.parametrize(
    ("host", "token", "allowed"),
    [
        *((host, "", True) for host in ("127.0.0.1", "::1", "localhost")),
        *((host, "", False) for host in ("0.0.0.0", None, "localhost.example.org")),
        ("0.0.0.0", "token", True),
    ],
)
def test_a_server_without_a_token_listens_on_loopback_only(host, token, allowed):
    refusal = serve.why_not(host, token)
    assert (refusal is None) == allowed
    assert refusal is None or TOKEN_VARIABLE in refusal


def test_vllm_learns_where_weights_come_from_and_that_requests_alone_set_the_sampling():
    options = serve.parser().parse_args(["--hf-config=/model", "--max-model-len=9", "--kv-cache-gb=0.5"])
    arguments = serve.engine_arguments(options, on_cpu=False)
    for argument in (
        "--load-format=dummy",
        "--generation-config=vllm",
        '--weight-transfer-config={"backend": "selfdistill"}',
        "--kv-cache-memory-bytes=536870912",
    ):
        assert argument in arguments
    assert "--enforce-eager" not in arguments
    assert "--enforce-eager" in serve.engine_arguments(options, on_cpu=True)


def test_on_a_cpu_latent_attention_takes_none_of_vllms_kernels_that_compute_it_wrongly(tmp_path):
    options = serve.parser().parse_args([f"--hf-config={tmp_path}", "--max-model-len=9"])
    exact = {"--attention-backend=CPU_MLA", '--compilation-config={"custom_ops": ["none"]}'}
    for config, on_cpu in (("{}", True), ('{"kv_lora_rank": 8}', False), ('{"kv_lora_rank": 8}', True)):
        (tmp_path / "config.json").write_text(config)
        arguments = set(serve.engine_arguments(options, on_cpu=on_cpu))
        assert exact & arguments == (exact if on_cpu and config != "{}" else set())


def test_the_servers_side_imports_no_megatron():
    modules = ", ".join(f"megatron_selfdistill.engines.vllm.{name}" for name in OF_SERVERS)
    subprocess.run([sys.executable, "-c", f"import sys; sys.modules['megatron'] = None; import {modules}"], check=True)
