# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Build the model chunks of this rank, wrapped for data parallelism, with Megatron's optimizer and scheduler."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from megatron_selfdistill.compat import cpu, older_megatron, repairs  # isort: skip  (must come before megatron.core)
import megatron.core
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config import Config, ModelConfig, OptimizerConfig, function_named
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.architecture import (
    layer_spec,
    padded_vocab_size,
    transformer_config,
    uses_transformer_engine,
)
from megatron_selfdistill.model.known_faults import refuse_known_faults

TESTED_MEGATRON_VERSIONS = ("0.16.1", "0.19.2")


def megatron_in_use() -> str:
    """Return the version and the path of the Megatron Core that this process has imported, for the log."""
    version = megatron.core.__version__
    tested = " and ".join(TESTED_MEGATRON_VERSIONS)
    note = "" if version in TESTED_MEGATRON_VERSIONS else f" (not tested; tested: {tested})"
    return f"megatron.core {version} from {next(iter(megatron.core.__path__))}{note}"


def build_chunks(
    model: ModelConfig,
    config: TransformerConfig | None,
    grid: RankGrid,
    vocab_size: int,
    *,
    transformer_engine: bool | None = None,
) -> list[torch.nn.Module]:
    """Return one ``GPTModel`` per virtual pipeline stage of this rank, on its device, in ``Float16Module`` for bf16.

    ``config`` is None with ``model.provider``, which makes its own configuration.  Under pipelining the first chunk of
    the first stage has the embedding, and the last chunk of the last stage has the output layer.
    ``transformer_engine``: whether to use Transformer Engine's layers; null uses `uses_transformer_engine`.
    """
    num_chunks = grid.virtual_pipeline_model_parallel_size or 1
    provider = _load_provider(model.provider, num_chunks) if model.provider else None
    if config is not None and transformer_engine is False:
        config = _for_local_layers(config)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        if provider is not None:
            chunk = provider(pre_process, post_process, vp_stage)
            _check_provided(chunk, model, grid)
        else:
            assert config is not None
            chunk = _gpt_model(model, config, grid, vocab_size, pre_process, post_process, vp_stage, transformer_engine)
        if not cpu.ON_CPU:
            chunk = chunk.cuda(torch.cuda.current_device())
        repairs.mark_weights_for_the_norm(chunk)
        older_megatron.mark_replicated_experts(chunk)
        for param in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        built: torch.nn.Module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        return built

    return _each_chunk(grid, build)


def build_on_meta(model: ModelConfig, config: TransformerConfig, grid: RankGrid, vocab_size: int) -> list[GPTModel]:
    """Return the chunks of `build_chunks` on the meta device: parameters with shapes and dtypes, without storage.

    The chunks always have Megatron's local layers, so that the result is the same on every machine.  The local layers
    have parameters of the same number and size as Transformer Engine's layers.
    """
    config = _for_local_layers(config)
    config.use_cpu_initialization = True  # the other initialization names the device of every parameter
    config.init_method = config.output_layer_init_method = config.embedding_init_method = lambda weight: weight
    config.gradient_accumulation_fusion = False
    meta = torch.device("meta")
    with meta, mock.patch.object(torch.cuda, "current_device", lambda: meta):
        return _each_chunk(
            grid,
            lambda pre_process, post_process, vp_stage: _gpt_model(
                model, config, grid, vocab_size, pre_process, post_process, vp_stage, transformer_engine=False
            ),
        )


def wrap_for_training(chunks: Sequence[torch.nn.Module], optimizer: OptimizerConfig) -> list[DistributedDataParallel]:
    """Return each chunk in Megatron's DDP, and set the hooks of schedules on their ``TransformerConfig``."""
    for chunk in chunks:
        _check_precision(chunk.config, optimizer)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        average_in_collective=False,  # gloo has no averaging reduction
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config = wrapped[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = None
    if optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        if config.pipeline_model_parallel_size > 1:
            grad_sync = [chunk.start_grad_sync for chunk in wrapped]
            config.grad_sync_func = grad_sync if len(wrapped) > 1 else grad_sync[0]
    return wrapped


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, num_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return Megatron's optimizer, with float32 main parameters for bf16, and its scheduler, which counts steps."""
    bf16 = optimizer.precision == "bf16"
    config = MegatronOptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        **dataclasses.asdict(optimizer.constants),
        clip_grad=optimizer.clip_grad,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        overlap_param_gather=optimizer.overlap_param_gather,
    )
    megatron_optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=not cpu.ON_CPU)
    num_warmup_steps = optimizer.lr_warmup_steps or 0  # a run has replaced null (`resumption.with_warmup`)
    scheduler = OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=num_warmup_steps,
        lr_decay_steps=max(optimizer.lr_decay.steps or num_steps, num_warmup_steps + 1),
        lr_decay_style=optimizer.lr_decay.style,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return megatron_optimizer, scheduler


def _each_chunk(grid: RankGrid, build: Callable[[bool, bool, int | None], Any]) -> list[Any]:
    num_chunks = grid.virtual_pipeline_model_parallel_size or 1
    return [
        build(
            grid.pp_rank == 0 and index == 0,
            grid.is_last_stage and index == num_chunks - 1,
            index if num_chunks > 1 else None,
        )
        for index in range(num_chunks)
    ]


def _gpt_model(
    model: ModelConfig,
    config: TransformerConfig,
    grid: RankGrid,
    vocab_size: int,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    transformer_engine: bool | None = None,
) -> GPTModel:
    te = uses_transformer_engine() if transformer_engine is None else transformer_engine
    make = functools.partial(
        GPTModel,
        config=config,
        transformer_layer_spec=layer_spec(config, vp_stage, transformer_engine=te),
        vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, grid.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
        seq_len_interpolation_factor=model.seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    chunk = _without_apex(make) if te and not layers._grad_accum_fusion_available else make()
    _refuse_changed_logits(chunk)
    return chunk


def _without_apex(make: Callable[[], GPTModel]) -> GPTModel:
    """Make a model whose Transformer Engine layers may accumulate weight gradients although apex's kernel is missing.

    Transformer Engine has its own kernel.  Megatron Core's own layers, such as the output layer, know only apex's
    kernel and refuse ``gradient_accumulation_fusion`` without apex.  This function makes them nevertheless and then
    switches them to an unfused gradient, which DDP's hook adds to ``main_grad``.
    """
    with mock.patch.object(layers, "_grad_accum_fusion_available", True):
        chunk = make()
    for module in chunk.modules():
        if type(module) in (layers.ColumnParallelLinear, layers.RowParallelLinear):
            module.gradient_accumulation_fusion = False
    return chunk


def _for_local_layers(config: TransformerConfig) -> TransformerConfig:
    config = copy.copy(config)
    config.persist_layer_norm = config.apply_rope_fusion = False
    config.moe_grouped_gemm = config.moe_permute_fusion = False
    config.gradient_accumulation_fusion = config.gradient_accumulation_fusion and layers._grad_accum_fusion_available
    return config


def _load_provider(dotted_path: str, num_chunks: int) -> Callable[[bool, bool, int | None], Any]:
    """Return the function at ``package.module.function``, with the arguments of Megatron-LM's ``model_provider``."""
    function = function_named("model.provider", dotted_path, {}, ConfigError)
    parameters = inspect.signature(function).parameters.values()
    takes_vp_stage = any(p.name == "vp_stage" or p.kind is p.VAR_KEYWORD for p in parameters)
    if num_chunks > 1 and not takes_vp_stage:
        raise ConfigError(
            f"model.provider={dotted_path!r} must take vp_stage to build {num_chunks} chunks per stage: "
            "add it, or set parallel.virtual_pipeline_model_parallel_size=null"
        )

    def provide(pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
        extra = {"vp_stage": vp_stage} if takes_vp_stage else {}
        return function(pre_process=pre_process, post_process=post_process, **extra)

    return provide


def _check_precision(config: TransformerConfig, optimizer: OptimizerConfig) -> None:
    """Raise `ConfigError` unless the model has the precision of the optimizer, which makes the main parameters."""
    built = "fp16" if config.fp16 else "bf16" if config.bf16 else "fp32"
    if built != optimizer.precision:
        raise ConfigError(f"the model was built in {built}, expected optimizer.precision={optimizer.precision}")


def _check_provided(chunk: Any, model: ModelConfig, grid: RankGrid) -> None:
    """Raise `ConfigError` unless the configuration of a provider's model agrees with ``parallel``."""
    path = model.provider
    if not isinstance(chunk, GPTModel):
        raise ConfigError(f"model.provider={path!r} must return a megatron.core GPTModel, got {type(chunk).__name__}")
    refuse_known_faults(chunk.config, transformer_engine=uses_transformer_engine())
    door("architectures").refuse_provided_layers(chunk)
    _refuse_changed_logits(chunk)
    if chunk.post_process and not chunk.parallel_output:
        raise ConfigError(f"model.provider={path!r} must build with parallel_output=True: the loss is vocab-parallel")
    for name, expected in [
        ("tensor_model_parallel_size", grid.tp_size),
        ("pipeline_model_parallel_size", grid.pp_size),
        ("context_parallel_size", grid.cp_size),
        ("expert_model_parallel_size", grid.ep_size),
        ("virtual_pipeline_model_parallel_size", grid.virtual_pipeline_model_parallel_size),
        ("sequence_parallel", grid.sequence_parallel),
    ]:
        got = getattr(chunk.config, name)
        if got != expected:
            raise ConfigError(f"model.provider={path!r} built with {name}={got}, but parallel.{name} is {expected}")


def _refuse_changed_logits(chunk: GPTModel) -> None:
    """Raise `ConfigError` for a model that changes logits after its output layer, which the loss would ignore."""
    if type(chunk)._postprocess is not GPTModel._postprocess:
        raise ConfigError(
            f"{type(chunk).__name__} has its own _postprocess, which training never calls with logits: change them "
            "in its output_layer instead"
        )
    if getattr(chunk.config, "use_mup", False):  # in versions after 0.16
        raise ConfigError("use_mup multiplies the logits after the output layer, which the loss ignores: unset it")


def new_chunks(
    config: Config, grid: RankGrid, vocab_size: int, model: ModelConfig | None = None
) -> list[torch.nn.Module]:
    """Return this rank's chunks of ``model``, null for the configured model, with initial weights."""
    model = model or config.model
    architecture = None
    if model.provider is None:
        architecture = transformer_config(model, config.parallel, config.optimizer, config.schedule)
    return build_chunks(model, architecture, grid, vocab_size)
