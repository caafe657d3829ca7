# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A vLLM server for rollouts, in the environment that has vLLM.

    selfdistill serve --hf-config DIR --max-model-len 4096 [--port 8000] [-- vLLM's own arguments]

The server is vLLM's OpenAI-compatible server with the routes that take weights and call methods.  The weights are
random until a trainer (rollout.placement=server, rollout.servers) sends some.  A client that reaches these routes
controls the server, so the server listens on this machine only, unless the environment variable
SELFDISTILL_SERVER_TOKEN holds a token: then every request but the health check needs the token.

A model that does not fit on one node is served by several nodes, each started with the same command but its own
--node-rank:

    ... --tensor-parallel-size 16 --nnodes 2 --node-rank 0|1 --master-addr ADDRESS-OF-RANK-0

Rank 0 answers requests; the nodes end together.  The nodes communicate with each other as PyTorch's processes do,
without the token: on a network that others can use, the token alone is no protection.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.engines.vllm.server.server_names import (
    BACKEND,
    PARENT_VARIABLE,
    SERVER_VARIABLE,
    TOKEN_VARIABLE,
    as_arguments,
    when_ended,
)
from megatron_selfdistill.engines.vllm.server.server_nodes import (
    ServerNode,
    is_loopback,
    meet,
    network_environment,
    why_not_gpus,
)
from megatron_selfdistill.engines.vllm.server.server_nodes import why_not as why_no_node

_GIB = 2**30
_MIDDLEWARE = "megatron_selfdistill.engines.vllm.plugin.middleware"
_GRACE_SECONDS = 15.0
# Seconds in which the requests of an ending server are answered.  vLLM never answers calls of methods and of weights
# that its engine had not finished when it ended, and waits for these answers for ever unless a limit is set.
_ANSWER_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until the parent process or another node of the server has ended.

    The parent process is named by the environment variable SELFDISTILL_SERVER_PARENT.  A server that ends drops the
    requests that it cannot answer within seconds.  A command that cannot be served ends with exit status 2.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    cut = given.index("--") if "--" in given else len(given)
    options, vllm_arguments = parser().parse_args(given[:cut]), given[cut + 1 :]
    token = os.environ.get(TOKEN_VARIABLE, "")
    _refuse(why_no_node(options.nnodes, options.node_rank, options.master_addr, token))
    is_head = options.node_rank == 0
    _refuse(why_not(options.host, token) if is_head else None)
    _set_environment(options)
    _refuse(_why_no_vllm())
    _watch_parent()

    import uvloop  # type: ignore[import-not-found]
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser, validate_parsed_serve_args, cli_env_setup = _command_line_of_vllm()
    cli_env_setup()
    arguments = engine_arguments(options, on_cpu=current_platform.is_cpu()) + vllm_arguments
    parsed = make_arg_parser(FlexibleArgumentParser(prog="selfdistill serve")).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    # Check again, now that vLLM has read all arguments, its own files of arguments included.
    _refuse(why_not(parsed.host, token) if is_head else None)
    _refuse(_why_not_parsed(options, parsed, None if current_platform.is_cpu() else current_platform.device_count()))
    if options.nnodes > 1:
        try:
            meet(_node(options), token, lost=_end)
        except OSError as error:
            sys.exit(str(error))
    if not is_head:
        from vllm.entrypoints.cli.serve import run_headless

        parsed.api_server_count = 0
        run_headless(parsed)
        return
    names = [*(["AdapterNamed"] if options.adapter_rank else []), *(["TokenRequired"] if token else [])]
    # The last middleware is the outermost.
    parsed.middleware = [*parsed.middleware, *(f"{_MIDDLEWARE}.{name}" for name in names)]
    uvloop.run(run_server(parsed, timeout_graceful_shutdown=_ANSWER_SECONDS))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, without the arguments that vLLM parses."""
    parser = argparse.ArgumentParser(
        prog="selfdistill serve",
        description="A vLLM server whose weights come from a trainer.",
        epilog="example:\n  selfdistill serve --hf-config Qwen3-8B --max-model-len 4096 -- --max-num-seqs 256\n\n"
        "Arguments after `--` go to vLLM unchanged.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hf-config", required=True, help="directory with the config.json of the trained model")
    parser.add_argument(
        "--host", default="127.0.0.1", help=f"address to listen on; any but this machine's own needs {TOKEN_VARIABLE}"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of this server, on all its nodes")
    parser.add_argument("--dtype", default="auto", help="dtype of weights and activations: bfloat16, float16, float32")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus response, in tokens")
    parser.add_argument(
        "--kv-cache-gb", type=float, help="GiB of KV cache; default: vLLM's, or a third of free memory on CPU"
    )
    parser.add_argument("--nnodes", type=int, default=1, help="nodes of this server, each started with this command")
    parser.add_argument("--node-rank", type=int, default=0, help="rank of this node; rank 0 answers requests")
    parser.add_argument("--master-addr", help="address by which the other nodes reach node rank 0")
    parser.add_argument(
        "--master-port", type=int, default=29501, help="a free port of node rank 0; the next port must be free too"
    )
    parser.add_argument("--adapter-rank", type=int, default=0, help="take adapters (adapter.rank) up to this rank")
    parser.add_argument(
        "--adapter-modules",
        default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        help="Hugging Face modules with adapters, those of all of adapter.layers by default",
    )
    return parser


def engine_arguments(options: argparse.Namespace, on_cpu: bool) -> list[str]:
    """Return the arguments of vLLM's server that come before the user's own arguments, which override them."""
    # Imported here and below, so that a wrong command line is refused before torch is imported.
    import psutil

    from megatron_selfdistill.engines.vllm.engine import WORKER_EXTENSION, cpu_engine_args
    from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter

    settings: dict[str, Any] = {
        "model": options.hf_config,
        "host": options.host,
        "port": options.port,
        "tensor_parallel_size": options.tensor_parallel_size,
        "dtype": options.dtype,
        "load_format": "dummy",
        "tokens_only": True,
        "trust_remote_code": False,
        # The request alone sets how tokens are sampled; a generation_config.json beside config.json must not.
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_uvicorn_access_log": True,
        "allowed_origins": "[]",  # no web page in a browser on this machine may send requests
    }
    if options.max_model_len is not None:
        settings["max_model_len"] = options.max_model_len
    kv_cache_gb = options.kv_cache_gb
    if on_cpu:
        settings |= cpu_engine_args(_described(options), options.max_model_len)
        kv_cache_gb = psutil.virtual_memory().available / _GIB / 3 if kv_cache_gb is None else kv_cache_gb
    if kv_cache_gb is not None:
        settings["kv_cache_memory_bytes"] = int(kv_cache_gb * _GIB)
    if options.adapter_rank:
        adapter = EngineAdapter(options.adapter_rank, 1.0, False, options.adapter_modules.split(","))
        settings |= adapter.engine_args(on_cpu=on_cpu)
    if options.nnodes > 1:
        settings |= {name: getattr(options, name) for name in ("nnodes", "node_rank", "master_addr", "master_port")}
        settings |= {"distributed_executor_backend": "mp", **({"headless": True} if options.node_rank else {})}
    return as_arguments(settings)


def why_not(host: str | None, token: str) -> str | None:
    """Return a message where a server may not listen on ``host``; None stands for every interface, as in vLLM."""
    if token or is_loopback(host or "0.0.0.0"):
        return None
    return (
        f"--host {host or '0.0.0.0'} can be reached from other machines, and every client of this server controls it: "
        f"set the environment variable {TOKEN_VARIABLE} to a secret that the trainer has too, or use --host 127.0.0.1"
    )


def _why_no_vllm() -> str | None:
    if "vllm" in sys.modules or importlib.util.find_spec("vllm") is not None:
        return None
    return (
        f"this server needs vLLM, and {sys.executable} has none: start it with the Python of an environment that has "
        "both, or install vLLM beside this package, in its clone: pip install -e '.[vllm]'"
    )


def _described(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config.json of the model; empty where it cannot be read, which vLLM reports in its own words."""
    from megatron_selfdistill.errors import CheckpointError
    from megatron_selfdistill.interop.hf_files import read_config

    try:
        return read_config(Path(options.hf_config))
    except CheckpointError:
        return {}


def _why_not_parsed(options: argparse.Namespace, parsed: argparse.Namespace, visible: int | None) -> str | None:
    if (parsed.nnodes, parsed.node_rank) != (options.nnodes, options.node_rank):
        return "--nnodes, --node-rank, --master-addr and --master-port must come before `--`"
    num_gpus = parsed.tensor_parallel_size * parsed.pipeline_parallel_size * parsed.data_parallel_size
    return why_not_gpus(options.nnodes, num_gpus, visible)


def _refuse(refusal: str | None) -> None:
    if refusal:
        print(f"selfdistill serve: {refusal}", file=sys.stderr)
        sys.exit(2)


def _command_line_of_vllm() -> tuple[Callable[..., Any], Callable[..., Any], Callable[[], None]]:
    """Return vLLM's make_arg_parser, validate_parsed_serve_args and cli_env_setup, which vLLM 0.33 has moved."""
    if importlib.util.find_spec("vllm.entrypoints.common.cli_args") is not None:
        arguments = importlib.import_module("vllm.entrypoints.common.cli_args")
        startup = importlib.import_module("vllm.entrypoints.common.startup")
    else:  # 0.32
        arguments = importlib.import_module("vllm.entrypoints.launchers.cli_args")
        startup = importlib.import_module("vllm.entrypoints.serve.utils.api_utils")
    return arguments.make_arg_parser, arguments.validate_parsed_serve_args, startup.cli_env_setup


def _node(options: argparse.Namespace) -> ServerNode:
    return ServerNode(options.nnodes, options.node_rank, options.master_addr, options.master_port)


def _set_environment(options: argparse.Namespace) -> None:
    """Set the environment variables that vLLM reads, before it is imported and for its child processes."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes of weights and methods
    os.environ[SERVER_VARIABLE] = str(os.getpid())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.nnodes > 1:
        try:
            network = network_environment(_node(options))
        except OSError as error:
            _refuse(f"--master-addr {options.master_addr} cannot be reached: {error}")
        for name, value in network.items():
            os.environ.setdefault(name, value)


def _watch_parent() -> None:
    """End this process with the process that started it, also where the parent was killed."""
    parent = int(os.environ.get(PARENT_VARIABLE, "0"))
    if not parent:
        return

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    when_ended(lambda: os.getppid() == parent, end, "parent watch")


def _end(why: str) -> None:
    """End this node; its workers, which may wait in a collective for ever, end with it (plugin/worker.py)."""
    print(f"megatron_selfdistill.engines.vllm.server.serve: {why}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
