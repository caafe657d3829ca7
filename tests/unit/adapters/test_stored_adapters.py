# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The description of stored adapters: the digest of their base, its place, and one sentence for each mistake."""

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
    assert found.settings == SETTINGS
    assert (found.base, found.base_digest) == (Path("/models/base"), "d1")
    assert read_stored_adapters(checkpoint(tmp_path / "full")) is None


def test_the_base_is_where_the_user_says_else_where_it_was_else_in_the_run_directory(tmp_path):
    base = checkpoint(tmp_path / "base_of_all")
    named = stored(tmp_path / "named", base=base)
    assert named.base_place() == base
    assert named.base_place("/elsewhere") == Path("/elsewhere")
    kept = stored(tmp_path / "kept")
    with raises("holds adapters alone, whose base d1 is not at .*kept/base: set adapter.base"):
        kept.base_place()
    assert kept.base_place(str(base)) == base
    inside = checkpoint(tmp_path / "kept" / "base")
    assert kept.base_place() == inside


def test_messages_name_both_digests_and_the_corrupt_file(tmp_path):
    found = stored(tmp_path, base=Path("/models/base"))
    found.require_base("d1", tmp_path, "checkpoint.load")
    with raises(
        r"/other is not the base of the adapters in .*iter_0000007: it has the digest d2, expected d1: set "
        r"checkpoint\.load to the present place of the checkpoint that the run began at, which was /models/base"
    ):
        found.require_base("d2", Path("/other"), "checkpoint.load")
    with raises(r"holds adapters alone, but a run begins at full weights: set checkpoint\.load to their base"):
        refuse_adapters(tmp_path / "checkpoints")
    base = checkpoint(tmp_path / "base")
    with raises("base holds full weights, expected a checkpoint of adapters"):
        require_adapters(base)
    (base / "adapter_config.json").write_text("{}")
    with raises("base is a directory of PEFT, expected a checkpoint of adapters: convert it with `selfdistill convert"):
        require_adapters(base)
    (found.path / "adapters.json").write_text(json.dumps({"rank": 4}))
    with raises(r"has a corrupt adapters\.json \(KeyError: 'alpha'\)"):
        read_stored_adapters(found.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 10**400}, r"adapter\.alpha must be at most"),
        ({"layers": [["linear_proj"]]}, "TypeError: unhashable"),
        ({"base": {"digest": "d1"}}, r"KeyError: 'checkpoint'"),
    ],
)
def test_a_description_with_a_value_of_another_type_is_corrupt(tmp_path, change, words):
    file = stored(tmp_path).path / "adapters.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with raises(rf"has a corrupt adapters\.json \(.*{words}"):
        read_stored_adapters(file.parent)


def test_given_settings_must_be_the_stored_ones(tmp_path):
    found = stored(tmp_path)
    assert stored_settings(load(["data.path=x", "data.tokenizer=t"]), found) == SETTINGS
    same = ["data.path=x", "data.tokenizer=t", *found.overrides().replace("'", "").split()]
    assert stored_settings(load(same), found) == SETTINGS
    with pytest.raises(
        ConfigError, match=r"holds other adapters: adapter\.alpha is 4\.0, expected 8\.0: set these keys"
    ):
        stored_settings(load([*same, "adapter.alpha=4"]), found)
