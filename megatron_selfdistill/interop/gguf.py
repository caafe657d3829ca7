# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert a GGUF file, the format of llama.cpp, to a Hugging Face directory with full weights and the tokenizer.

transformers reads the file and multiplies the quantised blocks out.  What transformers leaves out of the model that it
builds is an error here: tensors, settings of the architecture, and rules by which the tokenizer cuts text.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.errors import CheckpointError, ConfigError, first_few
from megatron_selfdistill.installation import is_installed
from megatron_selfdistill.interop.formats import directory, manifest

if TYPE_CHECKING:  # the command line is checked before torch and numpy are imported
    import torch
    from torch import Tensor

    from megatron_selfdistill.interop.release import Progress

_MAGIC = b"GGUF"
_NAME = "model.gguf"
_IN_SHAPES = {
    *"vocab_size attention.key_length attention.value_length".split(),
    *"expert_feed_forward_length expert_shared_feed_forward_length".split(),
}
"""The settings of an architecture that the shapes of the tensors state, too."""
_SPLIT_AS_GPT2 = ("gpt-2", "olmo")
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""The rules (``tokenizer.ggml.pre``) by which llama.cpp takes every digit alone, and cuts the rest as GPT-2 does."""
_INSTEAD = "convert the Hugging Face directory of this model with hf-to-megatron"


def require_gguf(file: Path) -> None:
    """Raise `CheckpointError` if ``file`` is no GGUF file, `ConfigError` if a package that reads it is missing."""
    if not file.is_file():
        found = "is a directory" if file.is_dir() else "does not exist"
        raise CheckpointError(f"expected a GGUF file at {file}, which {found}")
    with file.open("rb") as opened:
        if (start := opened.read(len(_MAGIC))) != _MAGIC:
            raise CheckpointError(
                f"expected a GGUF file, which begins with {_MAGIC!r}, but {file} begins with {start!r}"
            )
    if missing := [name for name in ("gguf", "accelerate") if not is_installed(name)]:
        raise ConfigError(
            f"gguf-to-hf needs {' and '.join(missing)}: run pip install -e '.[gguf]' in a clone of this project"
        )


def gguf_to_hf(
    file: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the model in the GGUF file ``file`` as the Hugging Face directory ``out``, and return ``out``.

    ``dtype``: the type of all weights; null is float32, which holds what the blocks stand for.
    ``allow_non_finite``: report weights that are NaN or infinite, instead of refusing them.
    Memory: the whole model in float32, and one file of weights.

    Raises: CheckpointError or ConfigError before the function writes anything, except CheckpointError for weights that
    are not finite; OSError while the function writes.  After an error the function removes its output.
    """
    import torch

    from megatron_selfdistill.interop.formats.safetensors_directory import SafetensorsWriter
    from megatron_selfdistill.interop.release import FiniteCheck, Progress

    file, out, progress, dtype = Path(file), Path(out), progress or Progress(), dtype or torch.float32
    directory.require_free(out)
    require_gguf(file)
    header = _Header(file)
    with _alone(file) as place:
        config = _config(header, place)
        tokenizer = _tokenizer(header, place)
        tensors = _tensors(header, place, config)
    if tokenizer.chat_template is None:
        progress.report(f"{file} has no chat template: set data.chat_template in runs of this model")
    described = [(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    num_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    finite = FiniteCheck(str(file), allow_non_finite, progress)
    with directory.created(out, num_bytes) as temporary:
        progress.start(num_bytes)
        writer = SafetensorsWriter(temporary, described, 5 * 10**9)
        for name, tensor in tensors.items():
            writer.write(name, finite.checked(name, tensor.to(dtype)))
            progress.advance(tensor.numel() * dtype.itemsize)
        writer.close()
        tokenizer.save_pretrained(temporary)
        _write_configs(header, config, dtype, temporary)
        for written in temporary.iterdir():
            manifest.sync(written)
    return out


class _Header:
    """The settings of a GGUF file, and the names and sizes of its tensors.

    Raises: CheckpointError for a file that is cut off, that is one of several parts, or that has no tokenizer.
    """

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        class Bounded(GGUFReader):
            """A reader that ends with the file: the library counts to any number of entries that the file states."""

            def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
                if offset + count * dtype().itemsize > len(self.data):
                    raise ValueError("its counts lead beyond its end")
                return super()._get(offset, dtype, count, override_order)

        self.file = file
        try:
            reader = Bounded(file)
            self.sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
            self._fields: Mapping[str, Any] = dict(reader.fields)
            self.architecture = str(self.value("general.architecture"))
            parts = int(self.value("split.count") or 1)
        except Exception as error:
            raise CheckpointError(f"{file} is cut off or corrupt ({error}): download it again") from error
        if parts > 1:
            raise CheckpointError(
                f"{file} is one of {parts} parts of a model: join them with `llama-gguf-split --merge` of llama.cpp, "
                "and name the result"
            )
        if "tokenizer.ggml.tokens" not in self._fields:
            raise CheckpointError(f"{file} has no tokenizer (tokenizer.ggml.tokens): {_INSTEAD}")

    def value(self, key: str) -> Any:
        """Return the value of a setting, or None if the file does not have the setting."""
        return self._fields[key].contents() if key in self._fields else None

    def settings(self) -> list[str]:
        """Return the names of the settings of the architecture, without its name in front."""
        start = f"{self.architecture}."
        return [key.removeprefix(start) for key in self._fields if key.startswith(start)]


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Yield a directory in which ``file`` is the only file, since transformers also reads what lies beside a file."""
    with tempfile.TemporaryDirectory(prefix="gguf-") as place:
        os.symlink(file.absolute(), Path(place) / _NAME)
        yield Path(place)


def _config(header: _Header, place: Path) -> Any:
    """Return transformers' config of the model, with the tokens that the file names as its begin, end and padding.

    Raises: CheckpointError where transformers cannot read the architecture or leaves a setting out; ConfigError for a
    model that the other commands do not convert.
    """
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_MAPPING

    from megatron_selfdistill.interop.hf.mapping import family_of

    try:
        config = AutoConfig.from_pretrained(place, gguf_file=_NAME, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot read the architecture {header.architecture!r} of {header.file} ({error}): {_INSTEAD}"
        ) from error
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(config, f"{name}_token_id", header.value(f"tokenizer.ggml.{key}_token_id"))
    try:
        family = family_of(config.to_dict())
        family.model_config(config.to_dict())
    except Exception as error:
        raise ConfigError(f"{header.file} holds a model that does not convert: {error}") from error
    known = GGUF_CONFIG_MAPPING.get(config.model_type)
    has_scaling = header.value(f"{header.architecture}.rope.scaling.type") not in (None, "none")
    left_out = [
        name
        for name in header.settings()
        if (has_scaling if name.startswith("rope.scaling.") else known and name not in {*known, *_IN_SHAPES})
    ]
    if left_out:
        raise CheckpointError(
            f"transformers leaves out settings of {header.file} that can change logits ({first_few(left_out, ', ')}): "
            f"{_INSTEAD}"
        )
    config.architectures = [family.architecture]
    return config


def _tokenizer(header: _Header, place: Path) -> Any:
    """Return the tokenizer, which cuts text by the rule that the file names.

    Raises: CheckpointError for a rule that transformers does not know.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=_NAME, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {header.file} ({error}): {_INSTEAD}"
        ) from error
    rule = header.value("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if rule in _SPLIT_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and rule not in _SPLIT_AS_GPT2:
        raise CheckpointError(
            f"transformers does not know the rule by which the tokenizer of {header.file} cuts text "
            f"(tokenizer.ggml.pre is {rule!r}): {_INSTEAD}"
        )
    return tokenizer


def _tensors(header: _Header, place: Path, config: Any) -> dict[str, Tensor]:
    """Return the weights in float32, by their names in a Hugging Face directory; tied weights once.

    Raises: CheckpointError where tensors of the file and of the model do not correspond, one by one.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from megatron_selfdistill.interop.hf.mapping import TIED

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=_NAME,
            config=config,
            dtype=torch.float32,
            # Else blocks stay packed where a kernel is installed, which transformers would also look for on the hub.
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise CheckpointError(f"transformers cannot read the weights of {header.file} ({error}): {_INSTEAD}") from error
    tied = {TIED[0]} if config.tie_word_embeddings else set()
    faults = {
        "lacks": set(found["missing_keys"]),
        "has an unknown": set(found["unexpected_keys"]),
        "has another shape of": {str(one[0]) for one in found["mismatched_keys"]},
    }
    for fault, names in faults.items():
        if names:
            raise CheckpointError(f"{header.file} {fault} {first_few(sorted(names), ', ')}: download it again")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if numbers != sum(header.sizes.values()):
        raise CheckpointError(
            f"transformers reads {numbers:,} of the {sum(header.sizes.values()):,} numbers in {header.file}: {_INSTEAD}"
        )
    return tensors


def _write_configs(header: _Header, config: Any, dtype: torch.dtype, target: Path) -> None:
    """Write config.json and generation_config.json, whose end tokens are those of a text and of a turn."""
    from transformers import GenerationConfig

    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = dtype
    config.save_pretrained(target)
    ends = [config.eos_token_id, header.value("tokenizer.ggml.eot_token_id")]
    ends = sorted({end for end in ends if end is not None})
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(target)
