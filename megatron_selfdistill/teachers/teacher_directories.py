# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The directories of the key ``teachers``: what they must hold, their loading, and the proof that none has changed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_selfdistill.adapters.configured_adapters import load_adapters, require_stored_rank
from megatron_selfdistill.adapters.low_rank_adapters import WithOtherAdapters
from megatron_selfdistill.adapters.stored_adapters import NAME, PEFT_CONFIG, read_stored_adapters, require_adapters
from megatron_selfdistill.checkpoint.external import load_weights
from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.directory import is_hugging_face
from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.checkpoint.formats.weights_digest import digest_of_files, known_digest
from megatron_selfdistill.checkpoint.frozen_weights import shared_base_digest, shared_checksums
from megatron_selfdistill.checkpoint.vocabulary import difference_to, tokenizer_directory
from megatron_selfdistill.config import Config, ModelConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.config.world_checks import check_model_divides, longest_context
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop.conversion import hf_to_megatron
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.interop.hf_files import CONFIG, read_config, require_hugging_face, weight_files
from megatron_selfdistill.interop.peft_adapters import WEIGHTS, peft_to_megatron, read_peft, require_fit
from megatron_selfdistill.interop.release import Progress
from megatron_selfdistill.model.model_values import differences
from megatron_selfdistill.teachers.teachers_config import guide_of

DIGESTS = "teachers"
"""The key of a trainer's state under which a checkpoint keeps the digest of each teacher's directory, by name."""
TeacherCopy = tuple[ModelConfig, dict[str, Path]]
"""The architecture of teachers that share one copy of a model, and the directory of each of them by name."""
_MAY_DIFFER = {"vocab_size", "max_position_embeddings"}


def teacher_directories(config: Config) -> dict[str, Path]:
    """Return the directory of each teacher that has one, in the order of the names."""
    named = config.named_teachers.items()
    return {name: Path(teacher.load) for name, teacher in named if teacher.load is not None}


def adapter_teachers(config: Config) -> dict[str, AdapterConfig]:
    """Return the settings of each teacher whose directory holds adapters alone, in the order of the names.

    The rank of a directory of PEFT is the largest that its conversion may have: layers of three modules become one.
    Raises: `CheckpointError` for a corrupt description.
    """
    found = {}
    for name, path in teacher_directories(config).items():
        if _is_peft(path):
            found[name] = AdapterConfig(rank=3 * read_peft(path, Progress())[0]["r"])
        elif (stored := read_stored_adapters(path)) is not None:
            found[name] = stored.settings
    return found


def teacher_architectures(config: Config) -> dict[str, ModelConfig]:
    """Return the architecture of each teacher that has another one than the student, in the order of the names.

    It is that of the teacher's directory, with the entry ``transformer``, and with the student's padded vocabulary.
    ``config``: with the architecture of the student.  A directory that states no architecture has the student's.

    Raises: `ConfigError` where a teacher has the entry ``transformer`` and no architecture of its own;
    `CheckpointError` for a corrupt description.
    """
    found, adapted = {}, adapter_teachers(config)
    for name, path in teacher_directories(config).items():
        entries = config.named_teachers[name].transformer
        stored = None if name in adapted else _stored_architecture(path)
        if config.model.provider is not None:
            stored = None
        if stored is None and entries:
            raise ConfigError(
                f"teachers.{name}.transformer is for a teacher of another architecture, and this one has the student's "
                "(adapters, a directory that states no architecture, or model.provider): remove the entry"
            )
        if stored is None or not (entries or differences(config.model, stored).keys() - _MAY_DIFFER):
            continue
        with about_architecture(f"teachers.{name}.load={path}"):
            found[name] = replace(
                stored,
                vocab_size=config.model.vocab_size,
                make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
                transformer=stored.transformer | entries,
            )
    return found


def teacher_copies(config: Config) -> list[TeacherCopy]:
    """Return each architecture of the teachers with full weights, and the directories of these teachers by name.

    That of the student is ``config.model`` itself.  Raises: as `teacher_architectures`.
    """
    found: list[TeacherCopy] = []
    adapted, others = adapter_teachers(config), teacher_architectures(config)
    for name, path in teacher_directories(config).items():
        if name in adapted:
            continue
        model = others.get(name, config.model)
        same = next((directories for other, directories in found if other == model), None)
        if same is None:
            found.append((model, {name: path}))
        else:
            same[name] = path
    return found


@contextmanager
def about_architecture(teacher: str) -> Iterator[None]:
    """Let an error of the ``teacher``'s architecture, whose keys are those of ``model``, name the teacher."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"the architecture of {teacher} does not fit the run: {error}") from error


def _is_peft(path: Path) -> bool:
    return (path / PEFT_CONFIG).is_file()


def require_teachers(config: Config) -> None:
    """Raise an error unless each teacher's directory holds a model that can read the student's tokens in this layout.

    The tokenizer must be the student's.  Another architecture must divide by the parallel sizes, and have as many
    positions as the longest context.  Adapters need the checkpoint of the student's start below them.

    ``config``: with the architecture of the student.  Each rank reads for itself; a process group is not needed.
    A directory without a tokenizer, and a checkpoint without arguments, are compared by their shapes when they load.

    Raises: `ConfigError` with both values, or with the first token that differs; `CheckpointError` for a directory that
    is missing or corrupt, and for adapters on other weights.
    """
    adapted = adapter_teachers(config)
    for name, path in teacher_directories(config).items():
        key = f"teachers.{name}.load={path}"
        if not path.is_dir():
            raise CheckpointError(f"{key} does not exist, expected a checkpoint or a Hugging Face directory")
        if name in adapted:
            _require_start(key, config, path)
        difference = difference_to(tokenizer_directory(path), config.data)
        if difference is not None:
            raise ConfigError(
                f"{key} has another tokenizer than data.tokenizer={config.data.tokenizer}, and a teacher reads the "
                f"student's tokens: {difference}: choose a teacher with the student's tokenizer"
            )
    others = teacher_architectures(config)
    guide = guide_of(config.teachers)
    if guide in adapted or guide in others:
        raise ConfigError(
            f"teachers.guide={guide} samples with full weights of the student's architecture, and its directory "
            "has adapters or another architecture: choose another guide, or rollout.guidance=none"
        )
    for name, model in others.items():
        key, longest = f"teachers.{name}.load={config.named_teachers[name].load}", longest_context(config)
        with about_architecture(key):
            check_model_divides(model, config.parallel)
        if model.max_position_embeddings < longest:
            raise ConfigError(
                f"{key} takes contexts of {model.max_position_embeddings} tokens at most, and the longest context of "
                f"this run has {longest}: set data.max_length={model.max_position_embeddings}"
            )


def _require_start(key: str, config: Config, path: Path) -> None:
    """Raise an error unless ``checkpoint.load`` may be the base of the adapters at ``path``; those of PEFT name none.

    A base whose digest no file states is compared when the adapters load.
    """
    if config.checkpoint.load is None:
        raise ConfigError(f"{key} holds adapters: set checkpoint.load to the weights below them")
    base, _ = directory.find(Path(config.checkpoint.load))
    if _is_peft(path):
        require_fit(path, base)
    elif (digest := known_digest(base)) is not None:
        require_adapters(path).require_base(digest, base, "checkpoint.load")


def _stored_architecture(path: Path) -> ModelConfig | None:
    if is_hugging_face(path):
        require_hugging_face(path)
        description = read_config(path)
        return family_of(description).model_config(description)
    directory.require_checkpoint(path)
    args = stored_args(path)
    return None if args is None else architecture_from_args(args)


def directory_digests(config: Config, saved: SavedRun | None) -> dict[str, str]:
    """Return the digest of each teacher's directory, which identifies its weights at any place.  Collective.

    Raises: CheckpointError on all ranks where a directory is missing or corrupt, and as `require_unchanged` for a run
    that continues from ``saved``.
    """
    digests = {name: _digest(path) for name, path in teacher_directories(config).items()}
    if saved is not None:
        require_unchanged(saved, digests, forced=config.checkpoint.resume == "force")
    return digests


def _digest(path: Path) -> str:
    if _is_peft(path):
        return digest_of_files(shared_checksums(path, [path / PEFT_CONFIG, path / WEIGHTS]))
    if not is_hugging_face(path):
        digest, stored = shared_base_digest(path), run_on_rank_0(lambda: read_stored_adapters(path))
        settings = {} if stored is None else shared_checksums(stored.path, [stored.path / NAME])
        return digest + digest_of_files(settings) if settings else digest
    files = run_on_rank_0(lambda: [path / CONFIG, *weight_files(path)])
    return digest_of_files(shared_checksums(path, files))


def require_unchanged(saved: SavedRun, digests: Mapping[str, str], forced: bool) -> None:
    """Raise CheckpointError where a teacher's weights are not those with which ``saved`` was trained.

    ``digests``: the present ones.  ``forced``: whether checkpoint.resume=force accepts other teachers.
    """
    stored: Mapping[str, str] = saved.trainer_state.get(DIGESTS, {})
    for name, digest in digests.items():
        if stored.get(name) != digest and not forced:
            raise CheckpointError(
                f"the directory of teachers.{name}.load has changed since {saved.path}: it has the digest {digest}, "
                f"expected {stored.get(name)}: restore it, start in a new run directory, or continue with the present "
                "weights: checkpoint.resume=force"
            )


def load_teacher(path: Path, chunks: Sequence[torch.nn.Module], vocab_size: int, run_dir: Path, verify: str) -> None:
    """Load a teacher's weights into ``chunks``; a Hugging Face directory is converted below ``run_dir`` meanwhile.

    ``run_dir`` lies on storage that every rank sees.  ``verify``: as for `load_weights`.
    Every rank of the world calls it.  Raises: `CheckpointError`.
    """
    if not is_hugging_face(path):
        load_weights(path, chunks, vocab_size, verify)
        return
    with _converted(run_dir, lambda out: hf_to_megatron(path, out)) as megatron:
        load_weights(megatron, chunks, vocab_size, "sizes")


def load_adapter_teacher(
    path: Path, start: Sequence[torch.nn.Module], config: Config, grid: RankGrid
) -> list[WithOtherAdapters]:
    """Return ``start``, the frozen chunks of the student's start, with the adapters of a teacher's directory.

    A directory of PEFT is converted below ``run_dir`` meanwhile.  Every rank of the world calls it.
    Raises: `CheckpointError` on all ranks, also for another base than ``checkpoint.load``; `ConfigError`.
    """
    assert config.checkpoint.load is not None
    base, verify = Path(config.checkpoint.load), config.checkpoint.verify
    with ExitStack() as stack:
        if _is_peft(path):
            given = path
            path = stack.enter_context(_converted(Path(config.run_dir), lambda out: peft_to_megatron(given, base, out)))
        adapters = run_on_rank_0(lambda: require_adapters(path))
        adapters.require_base(shared_base_digest(base), base, "checkpoint.load")
        require_stored_rank(adapters.path, adapters.settings.rank)
        with raise_on_all_ranks():
            chunks = [WithOtherAdapters(chunk, adapters.settings, grid) for chunk in start]
        for chunk in chunks:
            stack.enter_context(chunk.in_place())
        load_adapters(adapters.path, chunks, verify)
    return chunks


@contextmanager
def _converted(parent: Path, convert_to: Callable[[Path], object]) -> Iterator[Path]:
    """Convert a directory to a Megatron checkpoint in ``parent`` by ``convert_to``, and remove it at the end."""

    def convert() -> str:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=parent, prefix=".teacher-")
        try:
            convert_to(Path(temporary) / "megatron")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary

    temporary = Path(run_on_rank_0(convert))
    try:
        yield temporary / "megatron"
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
