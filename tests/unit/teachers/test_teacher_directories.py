# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A teacher's directory has the student's architecture and tokens, in either format, and a digest of its weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from letters import LETTERS, save_tokenizer
from safetensors.torch import load_file, save_file

from megatron_selfdistill.adapters.stored_adapters import StoredAdapters
from megatron_selfdistill.checkpoint.formats.manifest import NAME as MANIFEST
from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import Config, ParallelConfig, from_mapping
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.distributed import ranks as rank_groups
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop.conversion import hf_to_megatron
from megatron_selfdistill.model.build import new_chunks
from megatron_selfdistill.teachers.teacher_directories import (
    _digest,
    adapter_teachers,
    directory_digests,
    load_teacher,
    require_teachers,
    require_unchanged,
    teacher_architectures,
    teacher_copies,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Return a directory with a model of Hugging Face, hf, and the same as a checkpoint, megatron."""
    directory = tmp_path_factory.mktemp("student")
    hf_models.write("llama2", directory / "hf")
    save_tokenizer(directory / "hf")
    hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def config_of(student: Path, teacher: Path, **more: Any) -> Config:
    values = {
        "checkpoint": {"load": str(student / "megatron")},
        "data": {"tokenizer": str(student / "hf")},
        "teachers": {"math": {"load": str(teacher)}},
        "optimizer": {"precision": "fp32"},
        "run_dir": str(student / "run"),
    }
    return with_stored_architecture(from_mapping(values | more))


def test_a_teacher_of_the_students_architecture_and_tokens_is_taken_in_both_formats_and_no_other(student, tmp_path):
    require_teachers(config_of(student, student / "hf"))
    require_teachers(config_of(student, student / "megatron"))
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=str(place)):
            require_teachers(config_of(student, place))
    shutil.copytree(student / "hf", tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", LETTERS[:-2] + "hg")
    with pytest.raises(ConfigError, match=r"has another tokenizer than .*token 8 is 'g' here and 'h' there"):
        require_teachers(config_of(student, tmp_path / "hf"))


def write_changed(directory: Path, **changes: Any) -> Path:
    hf_models.write("llama2", directory)
    description = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(description | changes))
    return directory


def test_another_architecture_is_that_of_the_directory_with_the_students_vocabulary(student, tmp_path):
    """Another vocabulary size and other positions alone are no other architecture."""
    config = config_of(student, write_changed(tmp_path / "eps", rms_norm_eps=0.25))
    positions = write_changed(tmp_path / "positions", max_position_embeddings=99)
    assert teacher_architectures(config) == {"math": replace(config.model, layernorm_epsilon=0.25)}
    assert teacher_architectures(config_of(student, positions)) == {}
    entries = {"teachers": {"math": {"load": str(student / "hf"), "transformer": {"moe_aux_loss_coeff": 0.5}}}}
    found = teacher_architectures(config_of(student, student / "hf", **entries))
    assert found == {"math": replace(config.model, transformer={"moe_aux_loss_coeff": 0.5})}


def test_teachers_of_one_architecture_share_a_copy(student, tmp_path):
    one, two = (write_changed(tmp_path / name, rms_norm_eps=0.25) for name in ("one", "two"))
    places = {"b": student / "hf", "c": one, "a": two, "d": student / "megatron"}
    named = {name: {"load": str(place)} for name, place in places.items()}
    config = config_of(student, student, teachers=named)
    (other, of_other), (own, of_own) = teacher_copies(config)
    assert own is config.model and of_own == {name: places[name] for name in ("b", "d")}
    assert other == replace(own, layernorm_epsilon=0.25) and of_other == {name: places[name] for name in ("a", "c")}


def loaded(student: Path, teachers: list[Path]) -> list[bool]:
    """Return whether each teacher's weights, loaded in turn into one model, are those of the first; and its digest."""
    config, grid = config_of(student, teachers[0]), rank_groups.initialize(ParallelConfig(), seed=0)
    try:
        chunks = new_chunks(config, grid, 20)
        found = []
        for teacher in teachers:
            torch.nn.init.zeros_(next(chunks[0].parameters()))
            load_teacher(teacher, chunks, 20, student / "run", "checksums")
            found.append([p.detach().clone() for p in chunks[0].parameters()])
        return [all(a.equal(b) for a, b in zip(one, found[0], strict=True)) for one in found]
    finally:
        rank_groups.shutdown()


def test_a_directory_of_hugging_face_loads_the_bits_of_its_conversion_and_leaves_no_files(ranks, student):
    hf_models.write("llama2", student / "other", seed=5)
    places = [student / "megatron", student / "hf", student / "other"]
    assert ranks.run(loaded, student, places, world_size=1, init_process_group=False) == [[True, True, False]]
    assert not list((student / "run").iterdir())


def test_the_digest_of_a_directory_is_that_of_its_contents(ranks, student, tmp_path):
    for name in ("hf", "megatron"):
        shutil.copytree(student / name, tmp_path / name)
    places = [student / "hf", tmp_path / "hf", student / "megatron", tmp_path / "megatron"]
    configs = [config_of(student, place) for place in places]
    found = ranks.run(digests, configs, world_size=2)
    assert found[0] == found[1], "the ranks share the reading"
    assert found[0][0] == found[0][1] != found[0][2] == found[0][3]


def write_peft(directory: Path) -> Path:
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.mlp.down_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, directory / "adapter_model.safetensors")
    return directory


def test_the_settings_of_a_directory_of_peft_are_those_of_its_contents(student, tmp_path):
    (settings,) = adapter_teachers(config_of(student, write_peft(tmp_path / "one"))).values()
    assert settings.rank == 6, "q, k and v become one layer with the ranks of all"
    assert adapter_teachers(config_of(student, student / "hf")) == {}


COMMON = ["common.pt"] * older_megatron.stores_common_file()
DIGESTED = {
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
    "hf": {"config.json", "model.safetensors"},
    "sharded": {
        "config.json",
        "model.safetensors.index.json",
        *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    },
    "megatron": {*COMMON, "metadata.json", ".metadata", "__0_0.distcp"},
    "adapters": {"adapters.json", *COMMON, "metadata.json", ".metadata", "__0_0.distcp"},
}
"""Kind of directory -> the files of which a changed byte changes what the teacher computes."""


def test_a_changed_byte_of_any_file_that_decides_what_a_teacher_computes_changes_its_digest(ranks, student, tmp_path):
    """The settings of adapters and the architecture are no weights, and a teacher is another one without them."""
    write_peft(tmp_path / "peft")
    shutil.copytree(student / "hf", tmp_path / "hf")
    write_sharded(student / "hf", tmp_path / "sharded")
    shutil.copytree(student / "megatron" / "release", tmp_path / "megatron")
    (tmp_path / "megatron" / MANIFEST).unlink()  # as other programs write it: the files themselves are read
    shutil.copytree(tmp_path / "megatron", tmp_path / "adapters")
    described = StoredAdapters(tmp_path, AdapterConfig(rank=2), base_digest="d1", base=None).text()
    (tmp_path / "adapters" / "adapters.json").write_text(described)
    changed = []
    for kind in DIGESTED:
        for file in sorted(it.name for it in (tmp_path / kind).iterdir() if it.is_file()):
            copy = shutil.copytree(tmp_path / kind, tmp_path / f"{kind} {file}")
            content = bytearray((copy / file).read_bytes())
            digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
            content[digits[-1] if file.endswith(".json") else -1] ^= 1  # JSON stays JSON
            (copy / file).write_bytes(content)
            changed.append((kind, file, copy))
    places = [tmp_path / kind for kind in DIGESTED] + [copy for *_, copy in changed]
    found = ranks.run(digests_of_directories, places, world_size=1)[0]
    of_kind = dict(zip(DIGESTED, found, strict=False))
    noticed: dict[str, set[str]] = {kind: set() for kind in DIGESTED}
    for (kind, file, _), digest in zip(changed, found[len(DIGESTED) :], strict=True):
        noticed[kind] |= {file} if digest != of_kind[kind] else set()
    assert noticed == DIGESTED


def digests_of_directories(places: list[Path]) -> list[str]:
    found = []
    for place in places:
        try:
            found.append(_digest(place))
        except CheckpointError:
            found.append("refused")
    return found


def write_sharded(source: Path, directory: Path) -> None:
    """Write the Hugging Face directory ``source`` with its weights in two files and an index."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = [names[::2], names[1::2]]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def digests(configs: list[Config]) -> list[dict[str, str]]:
    return [directory_digests(config, None) for config in configs]


def test_other_weights_than_those_of_the_checkpoint_are_refused_with_both_digests_unless_forced():
    saved: Any = SimpleNamespace(path=Path("/run/iter_3"), trainer_state={"teachers": {"math": "aa"}})
    require_unchanged(saved, {"math": "aa"}, forced=False)
    require_unchanged(saved, {"math": "bb"}, forced=True)
    with pytest.raises(CheckpointError, match=r"teachers.math.load has changed since /run/iter_3: .*bb, expected aa"):
        require_unchanged(saved, {"math": "bb"}, forced=False)
    require_unchanged(SimpleNamespace(path=Path("/run"), trainer_state={}), {}, forced=False)  # type: ignore[arg-type]
