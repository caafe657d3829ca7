# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks that commands make before they import torch: missing inputs, and layouts that do not fit the ranks.

The code that reads the inputs later has the same messages.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import check_ranks, check_world
from megatron_selfdistill.data.records import data_files, is_hub_name
from megatron_selfdistill.data.tokenizer import tokenizer_place
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.installation import RUN, about_missing, install_command, is_installed
from megatron_selfdistill.interop.formats import directory
from megatron_selfdistill.interop.formats.hf_files import read_config, weight_files
from megatron_selfdistill.interop.formats.stored_adapters import read_stored_adapters, refuse_adapters, require_adapters

logger = logging.getLogger(__name__)

_TOKENIZERS = "tokenizer.json tokenizer.model vocab.json vocab.txt tekken.json *.tiktoken tiktoken.model".split()


def require_data(config: Config) -> None:
    """Raise `ConfigError` if the problems or the tokenizer of ``config`` do not exist.

    A name of the Hugging Face hub passes; if the hub has no address here, its libraries read their caches alone.
    """
    data = config.data
    if any(name is not None and is_hub_name(name) for name in (data.path, config.evaluation.path, data.tokenizer)):
        _go_offline_without_network()
    try:
        for path in (data.path, config.evaluation.path):
            if path is not None and not is_hub_name(path):
                data_files([path])
        if data.tokenizer is not None:
            tokenizer_place(data.tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _go_offline_without_network() -> None:
    """Set HF_HUB_OFFLINE, which the hub's libraries read when they are imported, if the hub's host has no address.

    They would ask again and again for a minute otherwise.  A proxy may know the address, and ``HF_HUB_OFFLINE=0`` asks.
    """
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    if host is None or "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        logger.warning("%s cannot be reached (%s): names on the hub are read from the cache alone", host, error)


def require_start(config: Config) -> None:
    """Raise `ConfigError` or `CheckpointError` if a run cannot begin at ``checkpoint.load``, unless it resumes.

    A run with adapters reads the weights below them at every start, also where it resumes.
    """
    load, resumes = config.checkpoint.load, _resumes(config)
    if config.adapter.base is not None:
        raise ConfigError(
            f"adapter.base={config.adapter.base} is for commands that read adapters: a run names the base of its "
            "adapters with checkpoint.load"
        )
    if config.adapter.load is not None and not config.adapter.rank:
        raise ConfigError(
            f"adapter.load={config.adapter.load} with adapter.rank=0, expected the rank of these adapters: set "
            "adapter.rank, adapter.alpha and adapter.layers to the values that `selfdistill convert inspect` shows"
        )
    if load is None or (resumes and not config.adapter.rank):
        return
    if resumes and not Path(load).exists():
        raise CheckpointError(
            f"checkpoint.load={load} does not exist, but a run reads the base of its adapters at every start: set "
            "checkpoint.load to the present place of the base"
        )
    require_checkpoint(Path(load))
    refuse_adapters(Path(load))
    if config.adapter.load is not None and not resumes:
        if Path(config.adapter.load).exists():
            require_adapters(Path(config.adapter.load))
        require_checkpoint(Path(config.adapter.load))


def require_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` if the layout of ``config`` does not fit ``world_size`` ranks.

    The check includes the sizes of the model only if no checkpoint states these sizes.
    """
    check_ranks(config, world_size)
    if names_its_model(config):
        check_world(config, world_size)


def names_its_model(config: Config) -> bool:
    """Return whether ``config`` alone, and no checkpoint, states the architecture."""
    return config.checkpoint.load is None and not _resumes(config)


def _resumes(config: Config) -> bool:
    """Return whether ``run_dir`` has a checkpoint from which the run would continue."""
    run_dir = config.run_dir if config.checkpoint.resume else None
    return run_dir is not None and bool(directory.candidates(Path(run_dir) / "checkpoints"))


def require_answers_per_problem(num_samples: int, ks: Sequence[int], majority_ks: Sequence[int] = ()) -> None:
    """Raise `ConfigError` if a k of pass@k or majority@k is less than 1 or more than ``num_samples``."""
    for name, those in (("pass@k", ks), ("majority@k", majority_ks)):
        if num_samples and (max(those, default=1) > num_samples or min(those, default=1) < 1):
            raise ConfigError(
                f"Evaluation: expected every k of {name} from 1 to the {num_samples} samples, got {list(those)}."
            )


def require_checkpoint(path: Path, iteration: int | None = None) -> None:
    """Raise `CheckpointError` if there is no Megatron checkpoint at ``path``, or no checkpoint of ``iteration``."""
    chosen = directory.of_iteration(Path(path), iteration)
    directory.refuse_hugging_face(chosen)
    holder = directory.tracked(chosen) or chosen
    if not directory.is_legacy(holder) and directory.lacks(holder):
        directory.resolve(chosen)


def require_model(config: Config, path: Path, iteration: int | None = None) -> None:
    """Raise `CheckpointError` if there is no model at ``path``: weights, or adapters whose base is there, too."""
    require_checkpoint(path, iteration)
    adapters = read_stored_adapters(directory.of_iteration(Path(path), iteration))
    if adapters is not None:
        require_checkpoint(adapters.base_place(config.adapter.base))


def require_hugging_face(path: Path) -> None:
    """Raise `CheckpointError` if ``path`` is no directory with a config.json and files of weights."""
    read_config(path)
    weight_files(Path(path))


def is_hugging_face(path: Path) -> bool:
    """Return whether ``path`` is a Hugging Face directory and no Megatron checkpoint."""
    try:
        directory.refuse_hugging_face(Path(path))
    except CheckpointError:
        return True
    return False


def tokenizer_directory(path: Path) -> Path | None:
    """Return the directory with the tokenizer of a checkpoint or a Hugging Face directory; None if there is none."""
    assets = path if is_hugging_face(path) else directory.hf_assets_of(directory.tracked(path) or path)
    return assets if assets is not None and any(any(assets.glob(pattern)) for pattern in _TOKENIZERS) else None


def with_stored_tokenizer(config: Config) -> Config:
    """Return ``config`` with the tokenizer of ``checkpoint.load`` if ``data.tokenizer`` is null; rank 0 says so."""
    load = config.checkpoint.load
    found = tokenizer_directory(Path(load)) if load is not None and config.data.tokenizer is None else None
    if found is None:
        return config
    if os.environ.get("RANK", "0") == "0":
        print(f"data.tokenizer={found}, the tokenizer of checkpoint.load", file=sys.stderr, flush=True)
    return replace(config, data=replace(config.data, tokenizer=str(found)))


@dataclass(frozen=True)
class NeededPackage:
    """An optional package that a run imports."""

    name: str
    """The name of the package in messages."""
    module: str
    extra: str
    """The extra of setup.py that installs the package."""
    reason: str
    """The settings that need the package."""
    place: str
    """The environment that must have the package."""
    is_here: bool
    """Whether this environment is the one that must have the package."""
    instead: str
    """The settings that do not need the package."""

    @property
    def is_installed(self) -> bool:
        """Whether this process has the package."""
        return is_installed(self.module)

    @property
    def remedy(self) -> str:
        """The command that installs the package, and the settings that do without."""
        return f"run {install_command(self.extra)}, or {self.instead}"


def needed_packages(config: Config) -> list[NeededPackage]:
    """Return the optional packages without which ``config`` cannot run."""
    return [*_vllm(config), *_transformer_engine(config), *_flash_linear_attention(config)]


def require_packages(config: Config) -> None:
    """Raise `ConfigError` if this environment lacks a package of every run, or one that ``config`` needs here."""
    missing = about_missing("a run", RUN)
    if missing is not None:
        raise ConfigError(missing)
    for package in needed_packages(config):
        if package.is_here and not package.is_installed:
            raise ConfigError(f"{package.reason} needs {package.name} in {package.place}: {package.remedy}")


def about_packages(config: Config) -> list[str]:
    """Return the lines of a plan about the optional packages of ``config``."""
    packages = needed_packages(config)
    lines = [
        f"needs {it.name} in {it.place}, because of {it.reason}: {it.remedy}"
        f"{'' if it.is_installed or not it.is_here else f' (this machine has no {it.name})'}"
        for it in packages
    ]
    if not packages:
        lines.append("needs no optional package")
    if not any(it.extra == "te" for it in packages):
        lines[-1] += "; Transformer Engine is used on GPUs if it is installed, and not needed"
    return lines


def _vllm(config: Config) -> list[NeededPackage]:
    rollout = config.rollout
    if rollout.engine != "vllm" or not config.samples:
        return []
    reason = f"rollout.engine=vllm with rollout.placement={rollout.placement}"
    in_process = "set rollout.engine=megatron, which samples in process"
    if rollout.placement == "colocated":
        return [NeededPackage("vLLM", "vllm", "vllm", reason, "the trainer's own environment", True, in_process)]
    if rollout.servers or rollout.server_python:
        place = "the environment of its servers"
        return [NeededPackage("vLLM", "vllm", "vllm", reason, place, False, in_process)]
    instead = f"set rollout.server_python to the Python of an environment with vLLM, or {in_process}"
    place = "the trainer's own environment, whose Python starts the servers"
    return [NeededPackage("vLLM", "vllm", "vllm", reason, place, True, instead)]


def _transformer_engine(config: Config) -> list[NeededPackage]:
    """Return Transformer Engine where Megatron's local layers are refused (`model.architecture`, `model.fp8`)."""
    transformer, tp = config.model.transformer, config.parallel.tensor_model_parallel_size
    found = []
    if transformer.get("multi_latent_attention") and tp > 1:
        reason = f"latent attention with parallel.tensor_model_parallel_size={tp}"
        found.append((reason, "set parallel.tensor_model_parallel_size=1"))
    if transformer.get("fp8"):
        found.append((f"model.transformer.fp8={transformer['fp8']}", "do not set model.transformer.fp8"))
    place = "the trainer's own environment"
    return [
        NeededPackage("Transformer Engine", "transformer_engine", "te", reason, place, True, instead)
        for reason, instead in found
    ]


def _flash_linear_attention(config: Config) -> list[NeededPackage]:
    """Return flash-linear-attention where gated delta nets compute with its kernels (`model.gated_delta_kernels`)."""
    transformer = config.model.transformer
    if transformer.get("experimental_attention_variant") != "gated_delta_net" or transformer.get("deterministic_mode"):
        return []
    from megatron_selfdistill.compat import cpu  # imports torch

    return [
        NeededPackage(
            "flash-linear-attention",
            "fla",
            "gdn",
            "the computation of gated delta nets on GPUs",
            "the trainer's own environment",
            not cpu.ON_CPU,
            "set model.transformer.deterministic_mode=true (with Transformer Engine also the environment variable "
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0), which computes them with PyTorch: slowly, with much memory",
        )
    ]
