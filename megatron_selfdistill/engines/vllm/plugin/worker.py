# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Methods that a vLLM worker has besides its own, called through ``collective_rpc``.

A worker imports this module before it loads its model, so the weight-transfer backend is registered here too.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.engines.vllm.plugin.adapter_loader import load_adapter
from megatron_selfdistill.engines.vllm.plugin.weight_backend import register
from megatron_selfdistill.engines.vllm.protocol import boot_id, nccl_version, own_gpu
from megatron_selfdistill.engines.vllm.server.server_names import SERVER_VARIABLE, when_ended


def end_with_server() -> None:
    """End this worker and its engine core once the API server (serve.py) has ended.

    A server that was killed cannot end them, and vLLM's engine core would keep its GPUs for ever.
    """
    server, parent = int(os.environ.get(SERVER_VARIABLE, "0")), os.getppid()
    if not server:
        return

    def end() -> None:
        # The worker may be the engine core itself; then its parent was the server.
        if parent != server and os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
        os._exit(1)

    when_ended(lambda: _is_alive(server), end, "server watch")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists and belongs to another user
    return True


register()
end_with_server()


class WorkerExtension:
    """A base class that vLLM's worker gets (``--worker-extension-cls``), so no name may be one of the worker's own.

    Arguments are JSON values, and results are None, dicts or lists: they travel over HTTP, where vLLM makes a string of
    anything else.
    """

    def abandon_weight_update(self: Any) -> None:
        """End an update that an earlier trainer has left unfinished, so that the next update may start."""
        self._weight_update_active = False
        if self.weight_transfer_engine is not None:
            self.weight_transfer_engine.reset_weight_update_target()

    def load_factors(self: Any, adapter: dict[str, Any]) -> None:
        """Replace the adapter by the factors of the last update, which are described by ``adapter`` (EngineAdapter)."""
        engine = self.weight_transfer_engine
        factors, engine.factors = engine.factors, {}
        load_adapter(self.model_runner, factors, EngineAdapter(**adapter))

    def place(self: Any) -> dict[str, Any]:
        """Return the place of this worker and its ways to receive weights, as `VllmServer.workers` describes."""
        return {
            "host": socket.gethostname(),
            "boot_id": boot_id(),
            "address": os.environ.get("VLLM_HOST_IP", ""),
            "nccl": nccl_version(),
            "gpu": own_gpu(),
        }

    def can_read(self: Any, path: str) -> dict[str, Any]:
        """Return whether this worker can read the file ``path``, and the host on which it runs."""
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError:
            return {"can_read": False, "host": socket.gethostname()}
        return {"can_read": True, "host": socket.gethostname()}
