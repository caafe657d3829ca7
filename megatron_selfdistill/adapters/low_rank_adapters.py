# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Low-rank adapters (LoRA) on the linear layers of a frozen model, in every parallel layout.

An adapter adds ``scale * (x A^T) B^T`` to the output of a linear layer with input x.  Only ``z = x A^T``, which has r
columns, crosses tensor-parallel ranks.  Source: LoRA (arXiv 2106.09685); rank-stabilised scale: arXiv 2312.03732.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_selfdistill.adapters import ADAPTER_SUFFIX
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.forward import unwrapped


class LowRankAdapter(MegatronModule):
    """The factors A and B of one linear layer, and what they add to its output.

    On each tensor-parallel rank:

    - column-parallel W [out / tp, in]: ``a [r, in]``, equal on all ranks, and ``b [out / tp, r]``;
    - row-parallel W [out, in / tp]: ``a [r, in / tp]``, and ``b [out, r]``, equal on all ranks.

    The factors have the dtype of the model.  The factor that is equal on all ranks gets the whole gradient on each of
    them; under sequence parallelism each rank has the part of its own tokens, which Megatron sums because of the
    attribute ``sequence_parallel``.
    """

    def __init__(self, linear: Any, name: str, adapter: AdapterConfig, grid: RankGrid) -> None:
        """Make the factors for ``linear``, the layer ``name`` of the whole model: random A, and B = 0.

        A is uniform on (-1 / sqrt(in), 1 / sqrt(in)) and depends on the seed, the name and the full shape alone, so
        that no layout changes it.
        """
        super().__init__(linear.config)
        self.is_column = _is_column(linear)
        self.scale, self.enabled = adapter.scale, True
        self.sequence_parallel = bool(linear.sequence_parallel) and grid.tp_size > 1
        self.is_gated = self.is_column and self.config.gated_linear_unit and name.endswith("linear_fc1")
        self.tp_group = grid.tp_group
        out_size, in_size = linear.weight.shape
        whole = in_size if self.is_column else in_size * grid.tp_size
        first = 0 if self.is_column else grid.tp_rank * in_size
        initial = _uniform((adapter.rank, whole), f"{adapter.seed}/{name}")[:, first : first + in_size]
        self.a = torch.nn.Parameter(initial.to(linear.weight, copy=True).contiguous())
        self.b = torch.nn.Parameter(linear.weight.new_zeros(out_size, adapter.rank))
        split, equal = (self.b, self.a) if self.is_column else (self.a, self.b)
        set_tensor_model_parallel_attributes(split, True, 0 if self.is_column else 1, 1)
        set_tensor_model_parallel_attributes(equal, False, -1, 1)
        equal.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the layer's output, for the layer's input x on this rank.

        Collectives over TP, of r columns: column-parallel layers gather z under sequence parallelism, else sum its
        gradient; row-parallel layers sum z, and scatter it under sequence parallelism.
        """
        z = F.linear(x, self.a)
        if self.is_column:
            if self.sequence_parallel:
                z = gather_from_sequence_parallel_region(z, group=self.tp_group)
            else:
                z = copy_to_tensor_model_parallel_region(z, group=self.tp_group)
        elif self.sequence_parallel:
            z = reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
        else:
            z = reduce_from_tensor_model_parallel_region(z, group=self.tp_group)
        return F.linear(self.scale * z, self.b)  # scaling r columns is cheaper than scaling the output

    def added(self, linear: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Return ``output`` of the layer and what the adapter adds to it; a forward hook of the layer."""
        if not self.enabled:
            return output
        result, bias = output
        return result + self(_normed(linear, inputs[0])), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return A and B as sharded tensors; a gated layer's B is cut as its weight is."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            prefix,
            {"b": 0} if self.is_column else {"a": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"] if metadata and "dp_cp_group" in metadata else None,
        )
        if self.is_gated:
            singleton = bool((metadata or {}).get("singleton_local_shards", False))
            state[f"{prefix}b"] = apply_swiglu_sharded_factory(state[f"{prefix}b"], sharded_offsets, singleton)
        return state


def add_adapters(chunks: Sequence[torch.nn.Module], adapter: AdapterConfig, grid: RankGrid) -> None:
    """Freeze the chunks and give their linear layers adapters; call it before DDP wraps the chunks.

    Adapters go to the layers that ``adapter.layers`` names, in attention, dense MLPs and shared experts.  Routed
    experts, routers, norms, embeddings and the output layer stay as they are.  At the start the model computes exactly
    what it did before, since B = 0.
    Raises: `ConfigError` where a chunk has none of the layers, and for a layer that tensor parallelism copies.
    """
    for chunk in chunks:
        model = unwrapped(chunk)
        model.requires_grad_(False)
        # A frozen router must not move its biases either.
        model.config.moe_router_bias_update_rate = 0.0
        made = _hooked_adapters(model, adapter, grid)
        if not made:
            raise ConfigError(f"adapter.layers={list(adapter.layers)}: a stage of the pipeline has no such layer")
        for parent, name, module in made:
            parent.add_module(name, module)
        if model.pre_process:
            # Recomputed blocks have a gradient only if their input has one, and the embedding is frozen.
            model.embedding.register_forward_hook(_require_gradient)


_Placed = tuple[torch.nn.Module, str, LowRankAdapter]
"""The parent of an adapter, its name in the parent, and the adapter."""


def _hooked_adapters(model: GPTModel, adapter: AdapterConfig, grid: RankGrid) -> list[_Placed]:
    """Return adapters that add to the output of the linear layers of ``model``, but are no modules of it yet.

    Raises: `ConfigError` for a layer that tensor parallelism copies.
    """
    made = []
    for parent, child, linear, name in list(_linears(model, adapter.layers)):
        if grid.tp_size > 1 and not _is_cut(linear):
            raise ConfigError(
                f"{name} is a whole copy on each of {grid.tp_size} tensor-parallel ranks, expected a layer that "
                f"they share: remove {child} from adapter.layers, or set parallel.tensor_model_parallel_size=1"
            )
        made.append((parent, child + ADAPTER_SUFFIX, LowRankAdapter(linear, name, adapter, grid)))
        linear.register_forward_hook(made[-1][2].added)
    return made


class AdapterSizes(NamedTuple):
    """What the adapters of a model would take on one rank."""

    parameters: int
    """The parameters on this rank."""
    model_parameters: int
    """The parameters that the tensor-parallel ranks together add to the model, without copies."""
    columns: tuple[float, ...]
    """The columns of all z = x A^T of a layer, per layer, as a token of a microbatch counts on this rank."""


def adapter_sizes(model: GPTModel, adapter: AdapterConfig, tp_size: int) -> AdapterSizes:
    """Return the sizes of what `add_adapters` would add to ``model`` on this rank of ``tp_size`` ranks.

    z of a column-parallel layer has the rows of all tokens; under sequence parallelism, z of a row-parallel layer has
    those of the rank's own tokens.
    """
    here = whole = 0
    columns = dict.fromkeys((layer.layer_number for layer in model.decoder.layers), 0.0)
    for _, _, linear, name in _linears(model, adapter.layers):
        out_size, in_size = linear.weight.shape
        is_column = _is_column(linear)
        here += adapter.rank * (out_size + in_size)
        whole += adapter.rank * (out_size * (tp_size if is_column else 1) + in_size * (1 if is_column else tp_size))
        share = tp_size if model.config.sequence_parallel and not is_column else 1
        columns[int(name.split(".")[2]) + 1] += adapter.rank / share
    return AdapterSizes(here, whole, tuple(columns.values()))


def _normed(linear: Any, x: Tensor) -> Tensor:
    """Return the input of the matrix product of ``linear``.

    Transformer Engine's fused layers normalise their input and keep the result to themselves, so that the norm runs
    once more here.
    """
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    weight = weight + 1 if linear.zero_centered_gamma else weight
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, linear.eps)
    return F.layer_norm(x, weight.shape, weight, linear.layer_norm_bias, linear.eps)


def _require_gradient(embedding: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


class WithoutAdapters(torch.nn.Module):
    """A chunk that runs without its adapters: the frozen model, with the weights of the chunk itself.

    It has no parameters of its own, and `unwrapped` returns the chunk's model.
    """

    def __init__(self, chunk: torch.nn.Module) -> None:
        super().__init__()
        self.module = chunk
        self._adapters = [module for module in unwrapped(chunk).modules() if isinstance(module, LowRankAdapter)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the chunk without its adapters.

        The adapters are off only during this call, so that a recomputation in the backward pass of the chunk has them.
        """
        with self.around_model():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def around_model(self) -> Iterator[None]:
        """Switch the adapters off while the context is open, in which the chunk's model runs alone (decoding)."""
        with _switched(self._adapters, False):
            yield


class WithOtherAdapters(torch.nn.Module):
    """A chunk that runs with adapters that are no part of it: its modules, its weights and its own state stay.

    `unwrapped` returns the chunk's model.  The factors are not trained.
    """

    def __init__(self, chunk: torch.nn.Module, adapter: AdapterConfig, grid: RankGrid) -> None:
        """Make random factors, which the caller replaces within `in_place`.  Raises: as `add_adapters`."""
        super().__init__()
        self.module = chunk
        self._placed = _hooked_adapters(unwrapped(chunk), adapter, grid)
        self._adapters = [module.requires_grad_(False) for _, _, module in self._placed]
        for module in self._adapters:
            module.enabled = False

    @property
    def factors(self) -> list[torch.nn.Parameter]:
        """The factors on this rank; a stage without the layers has none."""
        return [factor for module in self._adapters for factor in module.parameters()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the chunk with these adapters, which are on during this call only."""
        with _switched(self._adapters, True):
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the adapters modules of the chunk, in place of any of its own, while the context is open."""
        parents = list(unwrapped(self.module).modules())
        own = [(p, name, m) for p in parents for name, m in p.named_children() if isinstance(m, LowRankAdapter)]
        _replace(own, self._placed)
        try:
            yield
        finally:
            _replace(self._placed, own)


def _replace(removed: Sequence[_Placed], added: Sequence[_Placed]) -> None:
    for parent, name, _ in removed:
        delattr(parent, name)
    for parent, name, module in added:
        parent.add_module(name, module)


@contextlib.contextmanager
def _switched(adapters: Sequence[LowRankAdapter], enabled: bool) -> Iterator[None]:
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = enabled
    try:
        yield
    finally:
        for adapter, was_enabled in zip(adapters, before, strict=True):
            adapter.enabled = was_enabled


def _linears(model: GPTModel, layers: Sequence[str]) -> Iterator[tuple[torch.nn.Module, str, Any, str]]:
    """Yield parent, name in the parent, module and name in the whole model of each linear layer of ``layers``."""
    for layer in model.decoder.layers:
        for path, parent in layer.named_modules():
            if "experts" in path.split("."):  # routed experts; those that all tokens share are shared_experts
                continue
            for child, linear in parent.named_children():
                if child in layers and hasattr(linear, "weight"):
                    number = layer.layer_number - 1
                    yield parent, child, linear, f"decoder.layers.{number}.{path}.{child}".replace("..", ".")


def _is_column(linear: torch.nn.Module) -> bool:
    mode = getattr(linear, "parallel_mode", None)
    return mode == "column" if mode is not None else "Column" in type(linear).__name__


def _is_cut(linear: torch.nn.Module) -> bool:
    """Return whether tensor parallelism cuts a layer; Transformer Engine copies latent attention's down projections."""
    name = type(linear).__name__
    return getattr(linear, "parallel_mode", None) is not None or "Column" in name or "Row" in name


def _uniform(shape: tuple[int, int], name: str) -> Tensor:
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
