# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert a GGUF file, the format of llama.cpp, to a Hugging Face directory with full weights and the tokenizer.

transformers reads the file and multiplies the quantised blocks out.  What transformers leaves out without a word is an
error here: numbers of the file, settings of the architecture, and the rule by which the tokenizer cuts text.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.errors import CheckpointError, ConfigError, first_few
from megatron_selfdistill.interop.new_directory import created, require_free

if TYPE_CHECKING:  # the command line is checked before torch and numpy are imported
    import torch
    from torch import Tensor

    from megatron_selfdistill.interop.release import Progress

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


def gguf_to_hf(
    file: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model in the GGUF file ``file`` as the Hugging Face directory ``out``, and return ``out``.

    ``dtype``: the type of all weights; null is float32, which holds what the blocks stand for.
    Memory: the whole model in float32, and one file of weights.

    Raises: ConfigError if a package that reads the file is missing; CheckpointError for a file whose model would be
    another one, before the function writes anything; OSError.  After an error the function removes its output.
    """
    import torch

    from megatron_selfdistill.interop.release import Progress
    from megatron_selfdistill.interop.safetensors_directory import SafetensorsWriter

    file, out, progress, dtype = Path(file), Path(out), progress or Progress(), dtype or torch.float32
    require_free(out)
    with _alone(file) as place:
        header = _Header(file)
        config = _config(header, place)
        tokenizer = _tokenizer(header, place)
        tensors = _tensors(header, place, config)
    described = [(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    num_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    with created(out, num_bytes) as temporary:
        progress.start(num_bytes)
        writer = SafetensorsWriter(temporary, described, 5 * 10**9)
        for name, tensor in tensors.items():
            writer.write(name, tensor.to(dtype))
            progress.advance(tensor.numel() * dtype.itemsize)
        writer.close()
        tokenizer.save_pretrained(temporary)
        _write_configs(header, config, dtype, temporary)
        for written in temporary.iterdir():
            manifest.sync(written)
    return out


class _Header:
    """The settings of a GGUF file, and the number of elements of all tensors."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(file)
        self.file = file
        self.num_elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
        self._fields = dict(reader.fields)
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """Return the value of a setting, or None if the file does not have the setting."""
        return self._fields[key].contents() if key in self._fields else None

    def settings(self) -> list[str]:
        """Return the names of the settings of the architecture, without its name in front."""
        start = f"{self.architecture}."
        return [key.removeprefix(start) for key in self._fields if key.startswith(start)]


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Yield a directory in which ``file`` is the only file, since transformers also reads what lies beside a file.

    Raises: ConfigError for a missing package, and CheckpointError for all other errors, with the name of the file.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="gguf-") as place:
            os.symlink(file.absolute(), Path(place) / _NAME)
            yield Path(place)
    except ImportError as error:
        advice = "run pip install -e '.[gguf]' in a clone of this project"
        raise ConfigError(f"gguf-to-hf needs a package that is missing ({error}): {advice}") from error
    except Exception as error:
        raise CheckpointError(f"{file} cannot be converted ({error}): {_INSTEAD}") from error


def _config(header: _Header, place: Path) -> Any:
    """Return transformers' config of the model, with the tokens that the file names as its begin, end and padding.

    Raises: ValueError where transformers leaves out a setting; the errors of transformers and of the family.
    """
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_MAPPING

    from megatron_selfdistill.interop.hf.mapping import family_of

    config = AutoConfig.from_pretrained(place, gguf_file=_NAME, trust_remote_code=False)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(config, f"{name}_token_id", header.value(f"tokenizer.ggml.{key}_token_id"))
    family = family_of(config.to_dict())
    family.model_config(config.to_dict())
    known = GGUF_CONFIG_MAPPING.get(config.model_type)
    has_scaling = header.value(f"{header.architecture}.rope.scaling.type") not in (None, "none")
    left_out = [
        name
        for name in header.settings()
        if (has_scaling if name.startswith("rope.scaling.") else known and name not in {*known, *_IN_SHAPES})
    ]
    if left_out:
        raise ValueError(f"transformers leaves out settings that can change logits: {first_few(left_out, ', ')}")
    config.architectures = [family.architecture]
    return config


def _tokenizer(header: _Header, place: Path) -> Any:
    """Return the tokenizer, which cuts text by the rule that the file names.

    Raises: ValueError for a rule that transformers does not know.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=_NAME, trust_remote_code=False)
    rule = header.value("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if rule in _SPLIT_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and rule not in _SPLIT_AS_GPT2:
        raise ValueError(f"transformers does not know how its tokenizer cuts text: tokenizer.ggml.pre is {rule!r}")
    return tokenizer


def _tensors(header: _Header, place: Path, config: Any) -> dict[str, Tensor]:
    """Return the weights in float32, by their names in a Hugging Face directory; tied weights once.

    Raises: ValueError unless the tensors of the model are all numbers of the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from megatron_selfdistill.interop.hf.mapping import TIED

    model, found = AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=_NAME,
        config=config,
        dtype=torch.float32,
        # Else blocks stay packed where a kernel is installed, which transformers would also look for on the hub.
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        trust_remote_code=False,
    )
    tied = {TIED[0]} if config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if (missing := sorted(found["missing_keys"])) or numbers != header.num_elements:
        lacking = f", and none for {first_few(missing, ', ')}" if missing else ""
        raise ValueError(f"transformers reads {numbers:,} numbers, the file has {header.num_elements:,}{lacking}")
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
