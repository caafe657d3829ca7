# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The optional packages that a configuration needs: what a plan prints, and what a run checks before it starts."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

from megatron_selfdistill.config import Config
from megatron_selfdistill.errors import ConfigError


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
        return f"run pip install -e '.[{self.extra}]' in a clone of this project, or {self.instead}"


def is_installed(module: str) -> bool:
    """Return whether this process has ``module``, as far as can be said without the import."""
    if module in sys.modules:
        return True
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None  # a directory of data with this name has no origin


def needed_packages(config: Config) -> list[NeededPackage]:
    """Return the optional packages without which ``config`` cannot run."""
    return [*_vllm(config), *_transformer_engine(config), *_flash_linear_attention(config)]


def require_packages(config: Config) -> None:
    """Raise `ConfigError` if this environment lacks a package that ``config`` needs here."""
    for package in needed_packages(config):
        if package.is_here and not package.is_installed:
            raise ConfigError(f"{package.reason} needs {package.name} in {package.place}: {package.remedy}")


def described(config: Config) -> list[str]:
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
