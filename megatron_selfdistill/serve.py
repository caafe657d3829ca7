# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A vLLM server for rollouts, in the environment that has vLLM:

    python -m megatron_selfdistill.serve --hf-config FOLDER --max-model-len 4096 [--port 8000] [-- vLLM's own arguments]

It is vLLM's OpenAI-compatible server with the routes that take weights and call methods.  Its weights are random until
a trainer (rollout.placement=server, rollout.servers) sends some.  Whoever reaches those routes controls the server, so
it listens on this machine only, unless the environment variable SELFDISTILL_SERVER_TOKEN holds a token: then every
request but the health check needs it.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from megatron_selfdistill.rollout.engine import WORKER_EXTENSION, whole_prompts
from megatron_selfdistill.rollout.pairs import GUIDED_ENGINE_ARGS, GUIDED_ENVIRONMENT
from megatron_selfdistill.rollout.wire import BACKEND, PARENT_VARIABLE, SERVER_VARIABLE, TOKEN_VARIABLE, as_arguments

_GIB = 2**30
_GRACE_SECONDS = 15.0


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until the process named by SELFDISTILL_SERVER_PARENT is gone."""
    own, vllm_arguments = _split(sys.argv[1:] if argv is None else list(argv))
    options = parser().parse_args(own)
    _refuse_open_host(options.host)
    _set_environment(options)
    _watch_parent()

    import uvloop  # type: ignore[import-not-found]
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    arguments = engine_arguments(options, on_cpu=current_platform.is_cpu()) + vllm_arguments
    parsed = make_arg_parser(FlexibleArgumentParser(prog="megatron_selfdistill.serve")).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    _refuse_open_host(parsed.host)  # again, now that vLLM has read everything, its own files of arguments included
    if os.environ.get(TOKEN_VARIABLE):
        # The last one is the outermost.
        parsed.middleware = [*parsed.middleware, "megatron_selfdistill.vllm_plugin.access.TokenRequired"]
    uvloop.run(run_server(parsed))


def parser() -> argparse.ArgumentParser:
    """The command line, less what goes to vLLM unread."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_selfdistill.serve",
        description="A vLLM server whose weights come from a trainer.",
        epilog="What follows `--` is handed to vLLM as it is.",
    )
    parser.add_argument("--hf-config", required=True, help="folder with the config.json of the trained model")
    parser.add_argument("--host", default="127.0.0.1", help=f"another than this machine's own needs {TOKEN_VARIABLE}")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of this server")
    parser.add_argument("--dtype", default="auto", help="of weights and activations: bfloat16, float16, float32")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus response, in tokens")
    parser.add_argument("--kv-cache-gb", type=float, help="memory of the KV cache; default: vLLM's, or a third on CPU")
    parser.add_argument("--guided", action="store_true", help="prepare for rollout.guidance=mixed")
    return parser


def engine_arguments(options: argparse.Namespace, on_cpu: bool) -> list[str]:
    """What vLLM's server is started with, before the user's own arguments, which override it."""
    arguments = [
        f"--model={options.hf_config}",
        f"--host={options.host}",
        f"--port={options.port}",
        f"--tensor-parallel-size={options.tensor_parallel_size}",
        f"--dtype={options.dtype}",
        "--load-format=dummy",
        "--tokens-only",
        # Sampling is what a request says; a generation_config.json beside config.json must not change it.
        "--generation-config=vllm",
        f"--weight-transfer-config={json.dumps({'backend': BACKEND})}",
        f"--worker-extension-cls={WORKER_EXTENSION}",
        "--disable-uvicorn-access-log",
        # No web page that a browser on this machine shows has business here.
        "--allowed-origins=[]",
    ]
    if options.max_model_len is not None:
        arguments.append(f"--max-model-len={options.max_model_len}")
    kv_cache_gb = options.kv_cache_gb
    if on_cpu:
        arguments += ["--enforce-eager", *as_arguments(whole_prompts(options.max_model_len))]
        kv_cache_gb = _free_gib() / 3 if kv_cache_gb is None else kv_cache_gb
    if kv_cache_gb is not None:
        arguments.append(f"--kv-cache-memory-bytes={int(kv_cache_gb * _GIB)}")
    if options.guided:
        arguments += as_arguments(GUIDED_ENGINE_ARGS)
    return arguments


def why_not(host: str | None, token: str) -> str | None:
    """A sentence where a server may not listen on ``host``; None is vLLM's every interface."""
    if token or _is_loopback(host):
        return None
    return (
        f"--host {host or '0.0.0.0'} can be reached from other machines, and whoever reaches this server controls it: "
        f"set the environment variable {TOKEN_VARIABLE} to a secret that the trainer gets too, or use --host 127.0.0.1"
    )


def _refuse_open_host(host: str | None) -> None:
    refusal = why_not(host, os.environ.get(TOKEN_VARIABLE, ""))
    if refusal:
        sys.exit(refusal)


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:  # a name, which may mean anything
        return False


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those behind ``--``."""
    if "--" not in argv:
        return argv, []
    cut = argv.index("--")
    return argv[:cut], argv[cut + 1 :]


def _set_environment(options: argparse.Namespace) -> None:
    """What vLLM reads from the environment; before it is imported, and for its child processes."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes of weights and methods
    os.environ[SERVER_VARIABLE] = str(os.getpid())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.guided:
        os.environ.update(GUIDED_ENVIRONMENT)


def _watch_parent() -> None:
    """End with the process that started this one, also where it was killed and could not say so."""
    parent = int(os.environ.get(PARENT_VARIABLE, "0"))
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _free_gib() -> float:
    import psutil

    return psutil.virtual_memory().available / _GIB


if __name__ == "__main__":
    main()
