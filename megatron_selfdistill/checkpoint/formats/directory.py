# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The directory of checkpoints: find the latest checkpoint, and publish a new one atomically.

    begin -> all ranks fill ``.writing_iter_0000004_1f3a...`` -> publish -> ``iter_0000004``

A directory under its final name is complete.  A killed save leaves a directory under its temporary name; the next
`begin` removes that directory.  No function communicates; one rank calls the functions for all ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.manifest import sync
from megatron_selfdistill.data.records import is_hub_name
from megatron_selfdistill.errors import CheckpointError

LEGACY_FILE = "model_optim_rng.pt"
"""The name of a rank's file in the legacy format."""
TRACKER = "latest_checkpointed_iteration.txt"
"""The name of Megatron's tracker file, which names the latest checkpoint."""
CHECKPOINTS = "checkpoints"
"""The name, in a run directory, of the directory with the tracker file."""
HF_ASSETS = "huggingface"
"""The subdirectory of a Megatron checkpoint with the config.json, tokenizer and generation files of its source."""
_TEMPORARY = ".writing_"
_REPLACED = ".old"
_ITERATION = re.compile(r"iter_(\d+)(?:\.old)?")


def iteration_name(step: int) -> str:
    """Return Megatron-LM's name for the directory of the checkpoint of ``step``."""
    return f"iter_{step:07d}"


def iteration_of(path: Path) -> int:
    """Return the iteration in the name of a checkpoint; 0 for ``release`` and for any other name, as in Megatron-LM."""
    match = _ITERATION.fullmatch(path.name)
    return int(match[1]) if match else 0


def hf_assets_of(path: Path) -> Path | None:
    """Return the directory of a checkpoint's Hugging Face files: in it, beside it, or in its run directory."""
    for parent in (path, path.parent, path.parent.parent):
        if (parent / HF_ASSETS / "config.json").is_file():
            return parent / HF_ASSETS
    return None


def latest(directory: Path) -> Path | None:
    """Return the first complete checkpoint of `candidates`; None if there is no complete checkpoint."""
    return next((path for path in candidates(directory) if incomplete(path) is None), None)


def candidates(directory: Path) -> list[Path]:
    """Return the checkpoints in ``directory``, complete or not: the tracked checkpoint, then the others, newest first.

    The tracked checkpoint comes first because users of Megatron edit the tracker file to return to an older checkpoint.
    """
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _ITERATION.fullmatch(path.name)]
    # After a kill between two renames, the replaced directory comes after its replacement.
    found.sort(key=lambda path: (iteration_of(path), path.suffix != _REPLACED), reverse=True)
    named = tracked(directory)
    return found if named is None else [named, *(path for path in found if path != named)]


def resolve(path: Path) -> Path:
    """Return the checkpoint at ``path``: the directory itself, or the checkpoint that Megatron's tracker file names.

    A run directory stands for its directory with the tracker file.  After a crash in the middle of a replacement, the
    function returns the replaced checkpoint.

    Raises: CheckpointError where there is no complete torch_dist checkpoint.
    """
    path = of_run(Path(path))
    chosen = tracked(path) or path
    reason = incomplete(chosen)
    if reason is not None:
        replaced = chosen.parent / f"{chosen.name}{_REPLACED}"  # with_name() refuses "."
        if replaced.is_dir() and incomplete(replaced) is None:
            return replaced
        raise CheckpointError(
            f"expected a Megatron torch_dist checkpoint (an iter_ directory, the directory with {TRACKER}, or a run "
            f"directory) at {path}, but {chosen} {reason}{download_advice(path)}"
        )
    return chosen


def find(path: Path) -> tuple[Path, bool]:
    """Return the directory of the checkpoint at ``path``, and whether the checkpoint has the legacy format.

    Raises: CheckpointError where there is no checkpoint.
    """
    path = Path(path)
    refuse_hugging_face(path)
    chosen = tracked(path) or path
    return (chosen, True) if is_legacy(chosen) else (resolve(path), False)


def download_advice(path: Path) -> str:
    """Return the end of a message about a missing ``path`` that can be the name of a model on the hub, or "".

    Such a name is ``organisation/model``, and there is no directory ``organisation`` here.
    """
    name = str(path)
    if name.count("/") != 1 or path.parent.exists() or not is_hub_name(name):
        return ""
    return (
        f"; if {name} is a model on the Hugging Face hub, download it with `hf download {name} --local-dir DIR`, and "
        "name DIR"
    )


def of_run(path: Path) -> Path:
    """Return the directory with the tracker file of the run directory ``path``; every other ``path`` as it is."""
    held = path / CHECKPOINTS
    return held if held.is_dir() and not (path / TRACKER).is_file() else path


def of_iteration(path: Path, iteration: int | None) -> Path:
    """Return the directory of ``iteration`` in ``path``, which may be a run directory, or ``path`` itself for None."""
    return path if iteration is None else of_run(path) / iteration_name(iteration)


def is_legacy(directory: Path) -> bool:
    """Return whether ``directory`` is an ``iter_`` or ``release`` directory in the legacy ``torch`` format."""
    return any(directory.glob(f"mp_rank_*/{LEGACY_FILE}"))


def is_hugging_face(path: Path) -> bool:
    """Return whether ``path`` is a Hugging Face directory and no Megatron checkpoint."""
    chosen = tracked(path) or path
    return (chosen / "config.json").is_file() and not is_legacy(chosen) and not (chosen / "metadata.json").is_file()


def refuse_hugging_face(path: Path) -> None:
    """Raise CheckpointError, with the command for a conversion, where ``path`` is a Hugging Face directory."""
    if is_hugging_face(path):
        raise CheckpointError(
            f"{path} is a Hugging Face directory, expected a Megatron checkpoint: convert it with "
            f"`selfdistill convert hf-to-megatron --hf {path} --out NEW_DIRECTORY`, and name NEW_DIRECTORY"
        )


def require_checkpoint(path: Path, iteration: int | None = None) -> None:
    """Raise `CheckpointError` if there is no Megatron checkpoint at ``path``, or no checkpoint of ``iteration``."""
    chosen = of_iteration(Path(path), iteration)
    refuse_hugging_face(chosen)
    holder = tracked(chosen) or chosen
    if not is_legacy(holder) and lacks(holder):
        resolve(chosen)


def lacks(path: Path) -> str | None:
    """Return the missing part of a torch_dist checkpoint at ``path`` ("has no metadata.json"), or None.

    Of the contents of files, the function reads those of metadata.json.
    """
    if not path.is_dir():
        return "does not exist" if not path.exists() else "is not a directory"
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            return f"has no {name}"
    try:
        description = json.loads((path / "metadata.json").read_bytes())
        written = f"{description['sharded_backend']} {description['sharded_backend_version']}"
    except (ValueError, TypeError, KeyError) as error:
        return f"has a corrupt metadata.json ({type(error).__name__}: {error})"
    return None if written == "torch_dist 1" else f"was written in the format {written}, expected torch_dist 1"


def incomplete(path: Path) -> str | None:
    """Return why ``path`` is not a complete torch_dist checkpoint ("has no metadata.json"), or None if it is complete.

    Every file must have the size of its entry in the manifest.  In a checkpoint of another program, which has no
    manifest, every file must have at least the size that Megatron's ``.metadata`` implies.  The function reads no
    contents of files.
    """
    if (fault := lacks(path)) is not None:
        return fault
    try:
        entries = manifest.read(path)
        if entries is not None:
            return manifest.wrong_size(path, entries)
        from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata  # imports torch: seconds

        storage = load_metadata(path).storage_data
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} ")
    ends: dict[str, int] = {}
    for place in storage.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    torn = (name for name, end in ends.items() if not (path / name).is_file() or (path / name).stat().st_size < end)
    return next((f"has only a part of {name}" for name in torn), None)


def unverifiable(path: Path) -> str | None:
    """Return why a complete checkpoint of this program cannot be verified; None if it can.

    The answer for checkpoints of other programs, which write no manifest, is None.
    """
    from megatron_selfdistill.checkpoint.formats.saved_run import is_selfdistill_checkpoint  # imports torch

    if manifest.read(path) is not None or not is_selfdistill_checkpoint(path):
        return None
    return (
        f"has no {manifest.NAME}, which this program saved with it, so that corruption cannot be found: "
        "restore that file, or set checkpoint.verify=none to load the checkpoint without it"
    )


def begin(directory: Path, name: str, num_bytes: int) -> Path:
    """Make an empty directory in ``directory`` that becomes ``name`` when it is complete; first remove what kills left.

    What they left is of earlier iterations where ``name`` is one, else of the same name.  Nobody else is writing it:
    a run holds the lock of its directory, and a conversion is the only one to its target.

    Raises: CheckpointError if the disk has less than ``num_bytes`` free.
    """
    kind = r"iter_[\w.]+" if _ITERATION.fullmatch(name) else re.escape(name)
    left = re.compile(rf"\{_TEMPORARY}{kind}_[0-9a-f]{{8}}")
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        replaced = _ITERATION.fullmatch(path.name) and path.suffix == _REPLACED
        if left.fullmatch(path.name) or (replaced and incomplete(path.with_suffix("")) is None):
            shutil.rmtree(path, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(f"{name} needs {num_bytes:,} bytes but {directory} has {free:,} free: make room")
    temporary = _temporary(directory / name)
    temporary.mkdir()
    return temporary


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name}_{uuid.uuid4().hex[:8]}")


def publish(temporary: Path, target: Path) -> None:
    """Write the manifest of a completely written checkpoint, then rename its directory to ``target``.

    A crash at any point leaves either the old or the new checkpoint under ``target``.
    """
    manifest.write(temporary)
    for file in temporary.iterdir():
        if file.suffix != ".distcp":  # Megatron's writers have synced the .distcp files
            sync(file)
    sync(temporary)
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def set_latest(target: Path) -> None:
    """Point Megatron's tracker file at ``target``, atomically."""
    tracker = target.parent / TRACKER
    new = tracker.with_name(f"{_TEMPORARY}{TRACKER}")
    new.write_text(str(iteration_of(target)))
    sync(new)
    os.replace(new, tracker)
    sync(target.parent)


def prune(target: Path, keep_last: int | None) -> None:
    """Delete all but the last ``keep_last`` checkpoints up to and including ``target``; None keeps all."""
    if keep_last is None:
        return
    older = [path for path in target.parent.iterdir() if _ITERATION.fullmatch(path.name)]
    older = sorted((path for path in older if iteration_of(path) <= iteration_of(target)), key=iteration_of)
    for path in older[:-keep_last]:
        # Rename first, so that a kill leaves no half checkpoint under the name of a checkpoint.
        doomed = _temporary(path)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tracked(directory: Path) -> Path | None:
    """Return the directory that the tracker file names, existing or not; None if it names no directory.

    ``directory``: the directory with the tracker file, or the run directory of it.
    """
    directory = of_run(directory)
    tracker = directory / TRACKER
    text = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    if text == "release":
        return directory / "release"
    return directory / iteration_name(int(text)) if text.isdecimal() and len(text) < 20 else None
