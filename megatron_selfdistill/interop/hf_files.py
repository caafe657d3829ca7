# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files of a Hugging Face directory: config.json, the files of weights, and the other files of the model.

The directory may come from any source, and a user may publish what is made of it.  The functions therefore refuse names
in an index file and symbolic links that lead out of the directory, such as ``notes.txt -> ~/.ssh/id_rsa``, except links
into the ``blobs`` directory of the hub's cache and links for which the user vouches (`FOLLOW_LINKS`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats.directory import download_advice
from megatron_selfdistill.checkpoint.formats.manifest import sync
from megatron_selfdistill.data.records import from_json, kind_of
from megatron_selfdistill.errors import CheckpointError

CONFIG = "config.json"
HUB_FILES, HUB_IGNORED = "*.safetensors *.json *.jinja *.model *.txt *.py".split(), ["original/*", "consolidated*"]
"""The files of a model on the hub that are downloaded, and those among them that repeat its weights."""
FOLLOW_LINKS = "SELFDISTILL_FOLLOW_LINKS"
"""The environment variable with which a user vouches, by the value 1, for the links in Hugging Face directories."""
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".distcp", ".npz"}
_ABOUT_OTHER_WEIGHTS = {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
"""The descriptions of quantised weights, which are not copied: converted weights are not quantised."""
_MAX_ASSET_BYTES = 256 * 2**20


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return the files of weights in ``directory``, with the names of the tensors that the index assigns to each.

    The names are None where there is no index.  All files are safetensors, or all are PyTorch's pickles.

    The order of the search is that of transformers: ``model.safetensors``, its index, ``pytorch_model.bin``, its index,
    then any other safetensors files except Mistral's ``consolidated`` copies.

    Raises: CheckpointError where there are no weights, where a file is missing, and where a name leads out of the
    directory.
    """
    for single in _SINGLE_FILES:
        if _is_there(directory / single):
            return {contained(directory, single): None}
        index = directory / f"{single}.index.json"
        if _is_there(index):
            return _indexed(directory, index)
    others = sorted(file.name for file in directory.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not others:
        raise CheckpointError(f"{directory} has no weights: expected model.safetensors, pytorch_model.bin or an index")
    return {contained(directory, name): None for name in others}


def _is_there(file: Path) -> bool:
    return file.is_file() or file.is_symlink()  # a link that leads to no file is a mistake, not an absent file


def _indexed(directory: Path, index: Path) -> dict[Path, set[str] | None]:
    try:
        content: Any = from_json(contained(directory, index.name).read_bytes())
        entries = [(str(name), file) for name, file in content["weight_map"].items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is corrupt ({type(error).__name__}: {error})") from error
    files: dict[Path, set[str] | None] = {}
    for name, file in entries:
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index} places {name} in {file!r}, expected the name of a file beside it")
        names = files.setdefault(directory / file, set())
        assert names is not None
        names.add(name)
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{directory} lacks {path.name}, which {index.name} names")
        contained(directory, path.name)
    return files


def contained(directory: Path, name: str) -> Path:
    """Return ``directory / name``, unless it is no file, or a symbolic link that leads out of the directory.

    Links into the cache of the hub (``snapshots/REVISION/file -> ../../blobs/HASH``) are followed, and all links where
    the environment variable `FOLLOW_LINKS` is 1.
    Raises: CheckpointError naming what is there, or the link and its target.
    """
    file = directory / name
    if os.path.lexists(file) and not file.is_file():
        raise CheckpointError(f"{file} is {kind_of(file)}, expected a file")
    if not _is_inside(directory, file):
        raise CheckpointError(
            f"{file} is a symbolic link to {os.path.realpath(file)}, outside of its directory: put the file itself "
            f"there, or set the environment variable {FOLLOW_LINKS}=1 if the links in {directory} are your own"
        )
    return file


def _is_inside(directory: Path, file: Path) -> bool:
    if os.environ.get(FOLLOW_LINKS) == "1":
        return True
    root, target = (Path(os.path.realpath(path)) for path in (directory, file))  # resolve() fails for loops
    if target.is_relative_to(root):
        return True
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"


def require_hugging_face(path: Path) -> None:
    """Raise CheckpointError if ``path`` is no directory with a config.json and files of weights."""
    read_config(path)
    weight_files(Path(path))


def model_directory(name: Path) -> Path:
    """Return the directory of the Hugging Face model ``name``: itself, or that of the hub's cache, after a download.

    Raises: CheckpointError where there is no such model, or none can be downloaded.
    """
    if not download_advice(name):
        require_hugging_face(name)
        return name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name} cannot be had from the Hugging Face hub ({reason}){download_advice(name)}"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a Hugging Face directory.

    Raises: CheckpointError where the file is missing or is not a JSON object.
    """
    file = contained(Path(directory), CONFIG)
    try:
        config = from_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read, expected the config.json of a model ({error}){download_advice(Path(directory))}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


def copy_description(source: Path, target: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Make the directory ``target`` with config.json and the files of `copy_hf_assets`, all on the disk."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / CONFIG, target / CONFIG)
    copy_hf_assets(source, target, report)
    sync(target / CONFIG)
    sync(target)


def copy_hf_assets(source: Path, target: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Copy all files that are neither weights nor config.json, with their subdirectories.

    The files are tokenizers, chat templates, generation defaults, licences and the Python files of remote code.
    The function skips hidden files, links that lead out of the directory, and files of more than 256 MiB; ``report``
    receives one message for each skipped link and each skipped large file.
    """
    for file in hf_assets(source):
        name = str(file.relative_to(source))
        if not _is_inside(source, file):
            report(
                f"{name} is not copied: it is a symbolic link to {os.path.realpath(file)}, outside of {source}; "
                f"{FOLLOW_LINKS}=1 copies it"
            )
        elif file.stat().st_size > _MAX_ASSET_BYTES:
            report(f"{name} is not copied: its {file.stat().st_size:,} bytes are more than a tokenizer or code needs")
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
            sync(target / name)


def hf_assets(source: Path) -> Iterator[Path]:
    """Yield the files that `copy_hf_assets` considers, sorted; skip directories that are symbolic links."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            if not path.is_symlink():
                yield from hf_assets(path)
        elif path.is_file() and not _is_about_weights(path):
            yield path


def _is_about_weights(file: Path) -> bool:
    name = file.name
    return name == CONFIG or file.suffix in _WEIGHTS or name.endswith(".index.json") or name in _ABOUT_OTHER_WEIGHTS
