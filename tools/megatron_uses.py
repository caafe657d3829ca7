# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What this project uses of Megatron Core: found in its files, and in the tables of this module.

`uses` reads the files of the package without importing them.  It finds imported names, attributes of modules and
classes, attributes of parameters whose annotation is a class of Megatron, and calls of these.  The tables hold what
stands behind a value without a type: members that are read, methods that are called or replaced, and defaults.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from package_names import PACKAGE, definitions, parsed

_ROTARY = "megatron.core.models.common.embeddings.rope_utils"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_TRANSFORMER = "megatron.core.transformer.transformer_config.TransformerConfig"
_TRANSFORMER_ROOT = "megatron.core.transformer"
_DDP = "megatron.core.distributed.DistributedDataParallel"
_GPT = "megatron.core.models.gpt.GPTModel"
_LAYERS = "megatron.core.tensor_parallel.layers"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_ATTENTION = "megatron.core.transformer.attention.Attention"
_MOE = "megatron.core.transformer.moe"
_SAVING = "megatron.core.dist_checkpointing.strategies"
_DECODING = "rollout/megatron/decoding.py"

SINCE = {
    f"{_SAVING}.filesystem_async.get_write_results_queue": "0.17",
    "megatron.core.inference.utils.InferenceMode": "0.18",
    "megatron.core.dist_checkpointing.save(async_strategy)": "0.17",
    f"{_TRANSFORMER_ROOT}.mla_qk_norm_config.QKNormConfigResolver": "0.19",
    "megatron.core.tensor_parallel.random._get_share_storage": "0.19",
    f"{_TRANSFORMER_ROOT}.mla_qk_norm_config.QKNormConfigResolver._mla_fused_linear_or_default": "0.19",
}
"""Name, or function(parameter) -> the first version that must have it; each use stands behind a question of version."""
UNTIL: dict[str, str] = {}
"""Name, or function(parameter) -> the first version that need not have it, beside the names of `OLDER_ONLY`."""
OLDER_ONLY = {"compat/older_megatron.py": "0.19"}
"""File of the package -> the first version that does not run the file, and need not have the names in the file."""

MEMBERS = {
    _DDP: "no_sync start_grad_sync enable_forward_pre_hook scale_gradients offload_grad_buffers "
    "zero_grad_buffer remove_forward_pre_hook_handles config module buffers",
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucket": "grad_data offset",
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer": "buckets param_index_map",
    _GPT: "decoder embedding output_layer post_process pre_process "
    "position_embedding_type rotary_pos_emb set_input_tensor set_is_first_microbatch sharded_state_dict "
    "share_embeddings_and_output_weights shared_embedding_or_output_weight vocab_size parallel_output pg_collection "
    "_postprocess",
    _ATTENTION: "_adjust_key_value_for_inference core_attention layer_number "
    "num_query_groups_per_partition key_hidden_size val_hidden_size pg_collection attn_mask_type "
    "hidden_size_per_attention_head",
    "megatron.core.transformer.multi_latent_attention.MultiLatentAttention": "rotary_pos_emb",
    "megatron.core.transformer.transformer_block.TransformerBlockSubmodules": "layer_specs layer_norm",
    "megatron.core.transformer.transformer_block.TransformerBlock": "layers",
    "megatron.core.transformer.transformer_layer.TransformerLayer": "layer_number mlp self_attention",
    "megatron.core.transformer.transformer_layer.TransformerLayerSubmodules": "input_layernorm self_attention "
    "pre_mlp_layernorm mlp sharded_state_dict_keys_map",
    "megatron.core.transformer.attention.SelfAttentionSubmodules": "core_attention q_layernorm k_layernorm linear_qkv",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttentionSubmodules": "linear_q_up_proj "
    "linear_kv_up_proj q_layernorm kv_layernorm core_attention",
    "megatron.core.transformer.spec_utils.ModuleSpec": "module params submodules",
    f"{_LAYERS}.ColumnParallelLinear": "forward sequence_parallel skip_bias_add weight bias "
    "tp_group gradient_accumulation_fusion",
    f"{_LAYERS}.RowParallelLinear": "forward sequence_parallel skip_bias_add weight bias "
    "tp_group gradient_accumulation_fusion",
    _LAYERS: "HAVE_TE get_dummy_wgrad fused_weight_gradient_mlp_cuda",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker": "fork get_states set_states",
    f"{_MOE}.router.TopKRouter": "_apply_expert_bias",
    "megatron.core.optimizer.MegatronOptimizer": "optimizer param_groups get_parameters prepare_grads get_grad_norm "
    "step_with_ready_grads zero_grad reload_model_params sharded_state_dict load_state_dict config init_state_fn "
    "is_stub_optimizer",
    "megatron.core.optimizer.ChainedOptimizer": "chained_optimizers",
    _OPTIMIZER: "sharded_state_dict load_state_dict buffers "
    "model_param_gbuf_map model_param_group_index_map data_parallel_group _get_model_param_range_map "
    "_get_main_param_and_optimizer_states sharded_param_state_fully_reshardable "
    "load_parameter_state_from_fully_reshardable",
    "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler": "num_steps step state_dict load_state_dict",
    "megatron.core.inference.contexts.StaticInferenceContext": "key_value_memory_dict max_batch_size "
    "max_sequence_length batch_size_offset sequence_len_offset enable_decode_mode is_decode_only",
    "megatron.core.dist_checkpointing.mapping.ShardedTensor": "key data dtype local_shape global_shape global_offset "
    "axis_fragmentations replica_id prepend_axis_num allow_shape_mismatch",
    "megatron.core.dist_checkpointing.mapping.ShardedTensorFactory": "key data replica_id build",
    f"{_SAVING}.async_utils.AsyncCallsQueue": "schedule_async_request maybe_finalize_async_calls",
    f"{_SAVING}.async_utils.AsyncRequest": "async_fn add_finalize_fn execute_sync",
    _TRANSFORMER: "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func init_method "
    "output_layer_init_method embedding_init_method persist_layer_norm moe_router_load_balancing_type flash_decode "
    "cuda_graph_impl experimental_attention_variant moe_input_jitter_eps "
    "moe_router_force_load_balancing moe_expert_capacity_factor attention_backend moe_aux_loss_coeff moe_z_loss_coeff "
    "moe_router_bias_update_rate multi_latent_attention",
}
"""Module or class -> what is used of it behind values without a type; a class also has what its methods set."""

ASSIGNED = {
    "megatron.core.optimizer.clip_grads": "multi_tensor_applier multi_tensor_scale_impl",
    "megatron.core.optimizer.optimizer": "multi_tensor_applier multi_tensor_scale_impl",
    f"{_MOE}.moe_utils": "te_general_gemm fused_permute fused_unpermute fused_sort_chunks_by_index",
}
"""Module -> its names that the package assigns in loops, where `uses` does not see them."""

CONFIGURED = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
    "layernorm_epsilon gated_linear_unit add_bias_linear add_qkv_bias qk_layernorm init_method_std hidden_dropout "
    "attention_dropout params_dtype pipeline_dtype bf16 use_cpu_initialization tensor_model_parallel_size "
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel batch_p2p_comm "
    "deallocate_pipeline_outputs moe_token_dispatcher_type recompute_granularity recompute_method "
    "recompute_num_layers recompute_modules num_moe_experts moe_router_topk moe_ffn_hidden_size "
    "moe_router_load_balancing_type moe_router_enable_expert_bias moe_router_score_function activation_func "
    "bias_activation_fusion bias_dropout_fusion apply_rope_fusion persist_layer_norm masked_softmax_fusion "
    "gradient_accumulation_fusion moe_grouped_gemm moe_permute_fusion"
)
CALLS = {
    _TRANSFORMER: f"*, {CONFIGURED.replace(' ', ', ')}",
    "megatron.core.transformer.transformer_config.MLATransformerConfig": "*, rotary_base, rotary_percent",
    "megatron.core.optimizer.OptimizerConfig": "*, adam_beta1, adam_beta2, adam_eps, sgd_momentum",
    **dict.fromkeys(
        (
            f"{_SCHEDULES}.forward_backward_no_pipelining",
            f"{_SCHEDULES}.forward_backward_pipelining_with_interleaving",
            f"{_SCHEDULES}.forward_backward_pipelining_without_interleaving",
        ),
        "*, forward_step_func, data_iterator, model, num_microbatches, seq_length, micro_batch_size, forward_only",
    ),
    f"{_GPT}.forward": "input_ids, position_ids, attention_mask, *, inference_context, "
    "packed_seq_params, padding_mask, runtime_gather_output",
    "megatron.core.transformer.module.Float16Module.forward": "*, fp32_output",
    f"{_LAYERS}.ColumnParallelLinear.forward": "input_, *, weight",
    f"{_DDP}.disable_forward_pre_hook": "*, param_sync",
    f"{_DDP}.scale_gradients": "scaling_factor",
    f"{_OPTIMIZER}.sharded_state_dict": "model_sharded_state_dict, *, is_loading, metadata",
    f"{_OPTIMIZER}._get_main_param_and_optimizer_states": "model_param",
    f"{_OPTIMIZER}._get_model_param_range_map": "param",
    "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.step": "increment",
    f"{_GPT}.sharded_state_dict": "*, prefix, metadata",
    f"{_ATTENTION}._adjust_key_value_for_inference": "inference_context, query, key, value, rotary_pos_emb",
    f"{_MOE}.router.TopKRouter._apply_expert_bias": "routing_map, padding_mask",
    f"{_ROTARY}._apply_rotary_pos_emb_thd": "t, cu_seqlens, freqs, rotary_interleaved, _, mscale, *, cp_group",
    f"{_MOE}.router.switch_load_balancing_loss_func": "*, total_num_tokens",
    f"{_SAVING}.filesystem_async.FileSystemWriterAsync.write_preloaded_data": "transform_list, local_proc_idx, "
    "write_bucket, results_queue, count_queue, use_fsync, *, use_msc",
}
"""Function, method or class -> the call that stands behind a value without a type.

Parameters before ``*`` are passed by position, and must have these names; ``_`` stands for any name.
"""


class Replacement(NamedTuple):
    """The function of this project that Megatron calls in place of one of its own."""

    path: str
    """The file, relative to the package."""
    function: str
    """The name of the function, or Class.method."""
    has_owner: bool = False
    """Whether the first parameter is the object of the method."""
    by_keyword: bool = False
    """Whether Megatron passes every argument by its name, so that places do not matter."""
    renamed: Mapping[str, str] = {}
    """Megatron's name -> our name, of parameters that Megatron passes by position, or that are renamed on the way."""
    not_passed: tuple[str, ...] = ()
    """Optional parameters that no code of Megatron passes, and that ours need not have."""

    @property
    def where(self) -> str:
        """The function as a message names it."""
        return f"{self.function} of {self.path}"

    def definition(self, package: Path) -> ast.FunctionDef:
        """Return the definition of the function in the files of ``package``."""
        module = f"{package.name}.{self.path.removesuffix('.py').replace('/', '.')}"
        node: ast.AST | None = parsed(package.parent, module)
        assert node is not None, f"REPLACED names {self.path}, which is no file"
        for name in self.function.split("."):
            functions = (each for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ClassDef))
            node = next(each for each in functions if each.name == name)
        assert isinstance(node, ast.FunctionDef)
        return node


_OLDER_KEYWORD: dict[str, Any] = {
    "renamed": {"multi_latent_attention": "mla_rotary_interleaved"},
    "not_passed": ("multi_latent_attention",),
}
"""The keyword until 0.18, which `older_megatron.with_older_keyword` renames; 0.19 keeps it as an optional one."""
REPLACED = {
    f"{_ROTARY}._apply_rotary_pos_emb_bshd": Replacement("model/rotary.py", "rotated", **_OLDER_KEYWORD),
    f"{_ROTARY}._apply_rotary_pos_emb_thd": Replacement("model/rotary.py", "_rotated_packed", **_OLDER_KEYWORD),
    f"{_SAVING}.filesystem_async.get_write_results_queue": Replacement("compat/cpu.py", "results_in_a_file"),
    f"{_OPTIMIZER}.sharded_param_state_fully_reshardable": Replacement(
        "checkpoint/optimizer_shards.py", "parameter_state", True, renamed={"model_sharded_state_dict": "model"}
    ),
    f"{_OPTIMIZER}.load_parameter_state_from_fully_reshardable": Replacement(
        "checkpoint/optimizer_shards.py", "load_parameter_state", True, renamed={"state_dict": "loaded"}
    ),
    f"{_MOE}.router.TopKRouter._apply_expert_bias": Replacement(
        "compat/repairs.py", "apply_expert_bias_per_token", True
    ),
    f"{_MOE}.router.switch_load_balancing_loss_func": Replacement(
        "compat/repairs.py", "loss_of_at_least_one_token", by_keyword=True
    ),
    f"{_ATTENTION}._adjust_key_value_for_inference": Replacement(
        _DECODING, "adjust", renamed={"inference_context": "cache"}
    ),
    f"{_TRANSFORMER_ROOT}.mla_qk_norm_config.QKNormConfigResolver._mla_fused_linear_or_default": Replacement(
        "compat/repairs.py", "linear_of_the_spec", True
    ),
    f"{_LAYERS}.ColumnParallelLinear.forward": Replacement(_DECODING, "_product", True),
    f"{_LAYERS}.RowParallelLinear.forward": Replacement(
        "architectures/rare_layers.py", "BiasedExpertOutput.forward", True
    ),
    "megatron.core.transformer.dot_product_attention.DotProductAttention.__init__": Replacement(
        "model/local_attention.py", "CoreAttention.__init__", True, by_keyword=True
    ),
    "megatron.core.transformer.dot_product_attention.DotProductAttention.forward": Replacement(
        "model/local_attention.py", "CoreAttention.forward", True
    ),
    "megatron.core.transformer.module.MegatronModule.sharded_state_dict": Replacement(
        "adapters/low_rank_adapters.py", "LowRankAdapter.sharded_state_dict", True
    ),
}
"""Function or method of Megatron -> ours in its place: assigned, in a subclass, or in a layer spec."""

RELIED_ON = (
    (
        _TRANSFORMER,
        "calculate_per_token_loss=False mtp_num_layers=None moe_expert_capacity_factor=None moe_z_loss_coeff=None "
        "rotary_interleaved=False no_rope_freq=None activation_func_clamp_value=None attention_output_gate=False",
        "refuse_known_faults refuses other values, and no recipe sets the field",
    ),
    (
        _TRANSFORMER,
        "fp8=None fp4=None use_kitchen=False fp16=False fp8_param=False",
        "known_faults reads the field, and only optimizer.precision chooses a precision",
    ),
    (
        _TRANSFORMER,
        "flash_decode=False cuda_graph_impl='none' "
        "experimental_attention_variant=None moe_input_jitter_eps=None moe_router_force_load_balancing=False",
        "a model with another value cannot be sampled in process",
    ),
    (
        _TRANSFORMER,
        "moe_router_fusion=False",
        "kernels before Transformer Engine 2.14 compute scores in bf16, so that tokens change their experts",
    ),
    (
        _TRANSFORMER,
        "moe_aux_loss_coeff=0.0",
        "a model without this key has no balancing loss",
    ),
    (
        _TRANSFORMER,
        "layernorm_zero_centered_gamma=False apply_residual_connection_post_layernorm=False "
        "fp32_residual_connection=False window_size=None softmax_type='vanilla' glu_linear_offset=0.0 "
        "attention_softmax_in_fp32=True apply_query_key_layer_scaling=False",
        "the mapping of Hugging Face families sets the field only for a model that differs",
    ),
    (
        _TRANSFORMER,
        "perform_initialization=True variable_seq_lengths=False overlap_p2p_comm=False deterministic_mode=False",
        "the schedule and the initial weights of a run assume the value",
    ),
    (
        "megatron.core.optimizer.OptimizerConfig",
        "use_precision_aware_optimizer=False optimizer_cpu_offload=False fp16=False loss_scale=None "
        "decoupled_weight_decay=True overlap_param_gather_with_optimizer_step=False",
        "checkpoints and the EMA teacher read float32 main parameters, and AdamW decouples the decay",
    ),
    (
        f"{_DDP}Config",
        "check_for_nan_in_grad=False gradient_reduce_div_fusion=True num_distributed_optimizer_instances=1 "
        "bucket_size=None fp8_param_gather=False reduce_scatter_with_fp32_accumulation=False",
        "gradients are sums over the data-parallel ranks, and each optimizer shard belongs to one rank",
    ),
    (
        "megatron.core.tensor_parallel.vocab_parallel_cross_entropy",
        "label_smoothing=0.0",
        "no loss smooths labels",
    ),
    (
        _GPT,
        "scatter_embedding_sequence_parallel=True mtp_block_spec=None",
        "the loss reads the hidden states of a decoder alone, cut as Megatron cuts them",
    ),
)
"""(function or class, its defaults, the reason why the project relies on them)."""

OWN = {"latent_layernorm_epsilon"}
"""Attributes that this project sets on objects of Megatron, beside those whose name contains ``selfdistill``."""
SUBCLASSES = {
    _TRANSFORMER: ("megatron.core.transformer.transformer_config.MLATransformerConfig",),
    "megatron.core.optimizer.MegatronOptimizer": ("megatron.core.optimizer.ChainedOptimizer", _OPTIMIZER),
}
"""Class -> the classes whose members an object of the former may also have: the code asks for its type."""
TORCH_MODULE = frozenset(
    "add_module buffers children eval forward load_state_dict modules named_children named_modules named_parameters "
    "parameters register_buffer register_forward_hook requires_grad_ state_dict to train training zero_grad".split()
)
"""The members that classes of Megatron have from ``torch.nn.Module``."""


@dataclass(frozen=True)
class Call:
    """The arguments of a call."""

    positional: tuple[str, ...]
    """The name of each parameter that is passed by its place; ``_`` for any name."""
    keywords: tuple[str, ...]
    is_complete: bool
    """Whether the call passes no further arguments, such as ``**options``."""

    @classmethod
    def parse(cls, text: str) -> Call:
        """Return the call of an entry of `CALLS`; further arguments may be passed."""
        positional, _, keywords = text.partition("*")
        return cls(tuple(_words(positional)), tuple(_words(keywords)), is_complete=False)

    def __str__(self) -> str:
        arguments = [*self.positional, *(f"{word}=" for word in self.keywords), *([] if self.is_complete else ["..."])]
        return f"({', '.join(arguments)})"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@dataclass(frozen=True)
class Use:
    """One thing that this project needs of Megatron Core."""

    kind: str
    """import, attribute, member, call, replaced or default."""
    name: str
    """The full name in Megatron Core."""
    call: Call | None = None
    detail: str = ""
    """For a default: parameter=value."""
    reason: str = field(default="", compare=False)
    """For a default: why the project relies on it."""
    places: tuple[str, ...] = field(default=("tools/megatron_uses.py",), compare=False)
    """The files of the package, with lines, that need it; else the file of the tables."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{self.call or ''}{f'({self.detail})' if self.detail else ''}"

    @property
    def private_name(self) -> str | None:
        """The owner and the name of what is private or replaced, as tools/megatron_names.md lists it; else None."""
        parts = self.name.split(".")
        private = [i for i, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
        if not private and self.kind != "replaced":
            return None
        last = private[0] if private else len(parts) - 1
        return ".".join(parts[last - 1 : last + 1])


def uses(package: Path = PACKAGE) -> list[Use]:
    """Return everything that the files of ``package`` and the tables need, sorted, with the places of each."""
    found: dict[Use, list[str]] = {}
    for use in [*_in_tables(), *in_files(package)]:
        found.setdefault(use, []).extend(use.places)
    return sorted(
        (
            Use(use.kind, use.name, use.call, use.detail, use.reason, tuple(dict.fromkeys(places)))
            for use, places in found.items()
        ),
        key=str,
    )


def _in_tables() -> Iterator[Use]:
    for owner, members in MEMBERS.items():
        yield from (Use("member", f"{owner}.{member}") for member in members.split())
    for owner, members in ASSIGNED.items():
        yield from (Use("replaced", f"{owner}.{member}") for member in members.split())
    yield from (Use("call", name, Call.parse(text)) for name, text in CALLS.items())
    for name, replacement in REPLACED.items():
        yield Use("replaced", name, places=(f"{replacement.path}:{replacement.function}",))
    for name, defaults, reason in RELIED_ON:
        yield from (Use("default", name, detail=default, reason=reason) for default in defaults.split())


def in_files(package: Path) -> Iterator[Use]:
    """Yield what the files of ``package`` use of Megatron, without the tables."""
    readers: list[_Reader] = []
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "megatron.core" in source or "megatron.training" in source:
            readers.append(_Reader(str(path.relative_to(package))))
            readers[-1].read(ast.parse(source))
    ours = {name for reader in readers for name in reader.defined}
    yield from (use for reader in readers for use in reader.found if use.name not in ours)


@dataclass(frozen=True)
class _Known:
    """What a name in a file stands for: something of Megatron, or an object of a class of Megatron."""

    name: str
    is_object: bool = False


class _Reader(ast.NodeVisitor):
    """Collects the uses in one file; the names that a function binds hide those around it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: list[Use] = []
        self.defined: set[str] = set()
        """The members that classes of this project add to classes of Megatron, under the names of the latter."""
        self._known: dict[str, _Known] = {}

    def read(self, tree: ast.Module) -> None:
        """Collect the uses in ``tree``."""
        self._known = _imports(tree)
        self.visit(tree)

    def _add(self, kind: str, name: str, node: ast.AST, call: Call | None = None) -> None:
        member = name.rpartition(".")[2]
        is_ours = "selfdistill" in name or member in OWN or member in ("__path__", "__dict__")
        if not is_ours and name.startswith(("megatron.core.", "megatron.training.")):
            self.found.append(Use(kind, name, call, places=(f"{self.path}:{getattr(node, 'lineno', 0)}",)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Read a function with the names of its parameters, of its assignments and of its imports."""
        around, arguments = self._known, node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        bound = {p.arg for p in (*parameters, arguments.vararg, arguments.kwarg) if p is not None}
        bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for outer in (*node.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(outer)
        objects = {p.arg: _Known(c, True) for p in parameters if (c := self._class_of(p.annotation)) is not None}
        self._known = {n: k for n, k in around.items() if n not in bound} | objects | _imports(node)
        for child in node.body:
            self.visit(child)
        self._known = around

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Note the members of a class whose base is a class of Megatron."""
        known = [self._resolve(base) for base in node.bases]
        own = [name for name in definitions(node) if not name.startswith("__")]
        self.defined |= {f"{base.name}.{name}" for base in known if base is not None for name in own}
        self.generic_visit(node)

    def _class_of(self, annotation: ast.expr | None) -> str | None:
        """Return the class of Megatron that an annotation ``Class`` or ``Class | None`` names."""
        if isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None":
            annotation = annotation.left
        known = self._resolve(annotation) if isinstance(annotation, ast.Name) else None
        return None if known is None or known.is_object else known.name

    def _resolve(self, node: ast.expr | None) -> _Known | None:
        """Return what a name, or attributes of a name, stand for; an attribute of an object's attribute is unknown."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            if owner is not None and not (owner.is_object and isinstance(node.value, ast.Attribute)):
                return _Known(f"{owner.name}.{node.attr}", owner.is_object)
        return None

    def visit_Import(self, node: ast.Import) -> None:
        """Note imported modules."""
        for alias in node.names:
            self._add("import", alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Note imported names."""
        for alias in node.names:
            self._add("import", f"{node.module}.{alias.name}", node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note an attribute of something of Megatron; one that is assigned to a module or a class is replaced."""
        known = self._resolve(node)
        if known is not None:
            is_replaced = isinstance(node.ctx, ast.Store) and not known.is_object
            kind = "member" if known.is_object else "replaced" if is_replaced else "attribute"
            self._add(kind, known.name, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Note a call, also through ``functools.partial``, and the literal names of setattr and ``patch.object``."""
        function, arguments = node.func, node.args
        called = ast.unparse(function)
        if called in ("setattr", "delattr", "mock.patch.object") and len(arguments) > 1:
            owner, name = self._resolve(arguments[0]), arguments[1]
            if owner is not None and isinstance(name, ast.Constant):
                self._add("replaced", f"{owner.name}.{name.value!s}", node)
        is_partial = called in ("functools.partial", "partial") and bool(arguments)
        if is_partial:
            function, arguments = arguments[0], arguments[1:]
        known = self._resolve(function)
        if known is not None and not (isinstance(function, ast.Name) and known.is_object):
            starred = any(isinstance(each, ast.Starred) for each in arguments)
            keywords = tuple(word.arg for word in node.keywords if word.arg is not None)
            is_complete = not (is_partial or starred or len(keywords) < len(node.keywords))
            positional = () if starred else ("_",) * len(arguments)
            self._add("call", known.name, node, Call(positional, keywords, is_complete))
        self.generic_visit(node)


def _imports(scope: ast.AST) -> dict[str, _Known]:
    """Return what the import statements in a module or function bind, without those of inner functions."""
    found: dict[str, _Known] = {}
    for node in _own_statements(scope):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "megatron":
            found |= {alias.asname or alias.name: _Known(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "megatron":
                    found[alias.asname or "megatron"] = _Known(alias.name if alias.asname else "megatron")
    return found


def _own_statements(scope: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.expr):
            yield from _own_statements(child)
