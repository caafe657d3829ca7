# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The weight-transfer backend that loads the trainer's weights in a vLLM worker; receivers.py receives the bytes.

The trainer (transfer.py) names the transfer at ``init_weight_transfer_engine``, sends buckets that may split anywhere
between two tensors, and then a digest of all names.  An update that lacks a tensor, or leaves a parameter of the model
as it was, fails before the engine may answer with it.

A bucket holds weights, or factors of adapters, which have PEFT's names.  An update of factors alone leaves the weights.
vLLM drops its adapters at the end of each update, so that the factors wait here until `WorkerExtension.load_factors`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_selfdistill.engines.vllm.packed import after_reload, before_reload
from megatron_selfdistill.engines.vllm.plugin.receivers import RECEIVERS, Receiver
from megatron_selfdistill.engines.vllm.protocol import Layout, digest, unpack
from megatron_selfdistill.engines.vllm.server.server_names import BACKEND
from megatron_selfdistill.interop.hf.adapter_rules import PEFT_PREFIX

_SHOWN = 4


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The trainer's choice of transfer, sent once."""

    transfer: str
    """Name of the transfer: shared_memory, gloo or nccl."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the receiver's class."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The description of one bucket or, at the end and without names, of the complete update."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    """The place of the bytes, as the receiver reads it."""
    complete: str | None = None
    """The `digest` of all names that were sent, at the end of an update; else None."""


class SelfDistillEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The backend of one worker; a layer is rebuilt when its last tensor has come (vLLM's layerwise reload)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    _receiver: Receiver | None = None
    _reloading = False
    _verified = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Make the receiver of the transfer that the trainer has chosen."""
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = RECEIVERS[init_info.transfer](self.device, worker, **init_info.arguments)

    def start_weight_update(self) -> None:
        """Begin an update of all weights, of factors, or of both."""
        if self._reloading:  # an earlier update has failed: its half-filled layers must not count in this update
            self._finalize()
        self._reloading, self._verified = False, False
        self._received: list[str] = []
        self._unloaded = self._expected()
        self.factors: dict[str, Tensor] = {}

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive and load one bucket, or check that the update is complete."""
        if self._receiver is None:
            raise RuntimeError("expected init_weight_transfer_engine before the first weights; the trainer sends it")
        if update_info.complete is not None:
            self._verify(update_info.complete)
            return
        layout = Layout(update_info.names, update_info.dtypes, update_info.shapes)
        packed = self._receiver.receive(layout.num_bytes, update_info.where)
        if layout.names and layout.names[0].startswith(PEFT_PREFIX):
            self.factors.update((name, tensor.to("cpu", copy=True)) for name, tensor in unpack(packed, layout))
            self._received += layout.names
            return
        if not self._reloading:  # these are the first weights of the update
            self._reloading = True
            before_reload(self.model)
            initialize_layerwise_reload(self.model)
        with disable_mtp_completeness_check():
            loaded = self.model.load_weights(unpack(packed, layout))
        self._own_what_waits(packed)
        self._received += layout.names
        self._unloaded = set() if loaded is None else self._unloaded - loaded

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load one bucket, and return when the device has finished."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        """End an update whose completeness was checked."""
        if not self._verified:
            raise RuntimeError("expected the digest of all weights before finish_weight_update; the trainer sends it")
        if self._reloading:
            self._finalize()
        self._reloading = False

    def shutdown(self) -> None:
        """Close the receiver."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _expected(self) -> set[str]:
        """Return the parameters that an update must reach."""
        if self.model_config.quantization is not None:
            return set()  # quantised layers make some of their parameters themselves
        # vLLM wraps the layers that take adapters, and reports the names without the wrapping.
        names = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
        if getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            # On a CPU the output layer has a packed copy of the embedding's weights (packed.py).
            heads = [prefix for prefix, module in self.model.named_modules() if isinstance(module, ParallelLMHead)]
            names = {name for name in names if name.rpartition(".")[0] not in heads}
        return names

    def _own_what_waits(self, packed: Tensor) -> None:
        """Copy the tensors of ``packed`` that incomplete layers hold, since its memory will be overwritten."""
        first, behind = packed.data_ptr(), packed.data_ptr() + packed.numel()
        for module in self.model.modules():
            for _, call in get_layerwise_info(module).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and first <= value.data_ptr() < behind:
                        call.arguments[name] = value.clone()

    def _finalize(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        after_reload(self.model)

    def _verify(self, complete: str) -> None:
        if digest(self._received) != complete:
            raise ValueError(
                f"the trainer sent other tensors than {len(self._received)} here: {self._received[:_SHOWN]}"
            )
        if self._unloaded and (self._reloading or not self.factors):
            missing = sorted(self._unloaded)
            raise ValueError(
                f"{len(missing)} parameters of vLLM's model got no weights: {', '.join(missing[:_SHOWN])}; the server "
                "must run with the config.json of the trained model"
            )
        self._verified = True


def register() -> None:
    """Register `SelfDistillEngine` in this process; a repetition changes nothing."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SelfDistillEngine)
