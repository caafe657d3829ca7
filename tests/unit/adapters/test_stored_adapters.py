# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The description of stored adapters: the digest of their base, its place, and one refusal for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from saved_checkpoints import raises

from megatron_selfdistill.adapters.configured_adapters import stored_settings
from megatron_selfdistill.adapters.stored_adapters import (
    StoredAdapters,
    read_stored_adapters,
    refuse_adapters,
    require_adapters,
)
from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.weights_digest import base_digest
from megatron_selfdistill.config import load
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.errors import ConfigError

SETTINGS = AdapterConfig(rank=4, alpha=8.0, rank_stabilised=True, layers=["linear_proj"], seed=3)


def checkpoint(path: Path, contents: bytes = b"weights") -> Path:
    """Write files with the names of a torch_dist checkpoint."""
    path.mkdir(parents=True)
    for name in ("common.pt", ".metadata", "metadata.json", "__0_0.distcp"):
        (path / name).write_bytes(contents + name.encode())
    return path


def legacy(path: Path, contents: bytes = b"weights") -> Path:
    """Write files with the names of a legacy checkpoint of two ranks."""
    for rank in range(2):
        (path / f"mp_rank_0{rank}").mkdir(parents=True)
        (path / f"mp_rank_0{rank}" / "model_optim_rng.pt").write_bytes(contents)
    return path


@pytest.mark.parametrize("written", [checkpoint, legacy])
def test_the_digest_of_a_base_is_that_of_its_weights_at_any_place(tmp_path, monkeypatch, written):
    monkeypatch.setattr("megatron_selfdistill.checkpoint.formats.directory.incomplete", lambda path: None)
    one, same, other = written(tmp_path / "a"), written(tmp_path / "b"), written(tmp_path / "c", b"others")
    (same / "README.md").write_text("notes do not count")
    assert len(base_digest(one)) == 32
    assert base_digest(one) == base_digest(same) != base_digest(other)
    if written is checkpoint:  # checksums of a manifest, and those of the files themselves, are the same
        manifest.write(one)
        assert base_digest(one) == base_digest(same)
        (one / "__0_0.distcp").write_bytes(b"the manifest is believed; checkpoint.verify finds corruption")
        assert base_digest(one) == base_digest(same)


def stored(run: Path, base: Path | None = None, digest: str = "d1") -> StoredAdapters:
    """Write and read the description in a checkpoint of ``run``."""
    path = checkpoint(run / "checkpoints" / "iter_0000007")
    (path / "adapters.json").write_text(StoredAdapters(path, SETTINGS, digest, base).text())
    (path.parent / "latest_checkpointed_iteration.txt").write_text("7")
    found = read_stored_adapters(path.parent)
    assert found is not None and found == read_stored_adapters(path)
    return found


def test_a_description_returns_as_it_was_written(tmp_path):
    found = stored(tmp_path, base=Path("/models/base"))
    assert (found.settings, found.base, found.base_digest) == (SETTINGS, Path("/models/base"), "d1")
    assert read_stored_adapters(checkpoint(tmp_path / "full")) is None


def test_the_base_is_where_the_user_says_else_where_it_was_else_in_the_run_directory(tmp_path):
    base = checkpoint(tmp_path / "base_of_all")
    named = stored(tmp_path / "named", base=base)
    assert named.base_place() == base and named.base_place("/elsewhere") == Path("/elsewhere")
    kept = stored(tmp_path / "kept")
    with raises("kept/base: set adapter.base"):
        kept.base_place()
    assert kept.base_place(str(base)) == base
    inside = checkpoint(tmp_path / "kept" / "base")
    assert kept.base_place() == inside


def test_refusals_name_both_digests_or_the_key_or_the_corrupt_file(tmp_path):
    found = stored(tmp_path, base=Path("/models/base"))
    found.require_base("d1", tmp_path, "checkpoint.load")
    with raises(r"digest d2, expected d1: set checkpoint\.load to .* was /models/base"):
        found.require_base("d2", Path("/other"), "checkpoint.load")
    with raises(r"checkpoint\.load"):
        refuse_adapters(tmp_path / "checkpoints")
    base = checkpoint(tmp_path / "base")
    with raises("base holds full weights"):
        require_adapters(base)
    (base / "adapter_config.json").write_text("{}")
    with raises("base is a directory of PEFT"):
        require_adapters(base)
    description, file = json.loads(found.text()), found.path / "adapters.json"
    huge, lists, lost = {"alpha": 10**400}, {"layers": [["linear_proj"]]}, {"base": {"digest": "d1"}}
    for corrupt in ({"rank": 4}, *(description | change for change in (huge, lists, lost))):
        file.write_text(json.dumps(corrupt))
        with raises(r"has a corrupt adapters\.json"):
            read_stored_adapters(found.path)


def test_given_settings_must_be_the_stored_ones(tmp_path):
    found, run = stored(tmp_path), ["data.path=x", "data.tokenizer=t"]
    assert stored_settings(load(run), found) == SETTINGS
    same = [*run, *found.overrides().replace("'", "").split()]
    assert stored_settings(load(same), found) == SETTINGS
    with pytest.raises(ConfigError, match=r"adapter\.alpha is 4\.0, expected 8\.0"):
        stored_settings(load([*same, "adapter.alpha=4"]), found)
