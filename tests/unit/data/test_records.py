# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every format holds the same problems, and an unreadable source gives one message with file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_sources import load_problems, write_parquet

from megatron_selfdistill.data import records
from megatron_selfdistill.data.records import finite_number, plain, text_or_none, whole_number

RECORDS = [{"problem": f'What, "{n} + {n}"?\n', "solution": f"It is {2 * n}: é.", "id": f"r{n}"} for n in range(3)]
RECORDS[1]["answer"] = "2"


def as_jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    ".jsonl": lambda file, records: file.write_bytes(as_jsonl(records)),
    ".json": lambda file, records: file.write_text(json.dumps(records, indent=1)),
    ".parquet": lambda file, records: write_parquet(file, [{"answer": None, **record} for record in records]),
    ".JSONL": lambda file, records: file.write_bytes(as_jsonl(records)),
}


def refusal(path: object, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_problems(path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 700
    return sentence


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_alone_and_in_a_directory_of_shards_holds_the_same_problems(tmp_path: Path, ending: str) -> None:
    (tmp_path / "one.jsonl").write_bytes(as_jsonl(RECORDS))
    wanted = load_problems(tmp_path / "one.jsonl").fingerprint
    shards = tmp_path / "shards"
    shards.mkdir()
    WRITERS[ending](shards / f"part-00001{ending}", RECORDS[2:])
    WRITERS[ending](shards / f"part-00000{ending}", RECORDS[:2])
    (shards / "README.md").write_text("What is here.")
    (shards / "_SUCCESS").write_text("")
    (shards / "._part.jsonl").write_text("of another system")
    (shards / "dataset_infos.json").write_text("{}")
    assert load_problems(shards).fingerprint == wanted
    assert load_problems(f"{shards}/part*{ending}").fingerprint == wanted
    found = load_problems([shards / f"part-00000{ending}", str(shards / f"part-00001{ending}")])
    assert found.fingerprint == wanted
    assert found.problems[2].location.startswith(f"{shards}/part-00001{ending}:")
    (tmp_path / "[1].jsonl").write_bytes(as_jsonl(RECORDS))
    assert load_problems(tmp_path / "[1].jsonl").fingerprint == wanted, "a name may hold the characters of a glob"


def test_a_glob_of_directories_and_their_files_reads_each_file_once(tmp_path: Path) -> None:
    for number, record in enumerate(RECORDS):
        (tmp_path / f"shard{number}").mkdir()
        (tmp_path / f"shard{number}" / "data.jsonl").write_bytes(as_jsonl([record]))
    for pattern in ("shard*", "shard*/*", "shard[012]/**"):
        assert [problem.id for problem in load_problems(f"{tmp_path}/{pattern}").problems] == ["r0", "r1", "r2"]


def test_paths_that_hold_no_data_are_refused_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "dangling.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.jsonl").write_bytes(as_jsonl(RECORDS))
    (tmp_path / "two" / "a.json").write_text(json.dumps(RECORDS))
    for path, named in {
        tmp_path: "none",
        tmp_path / "notes.txt": ".parquet",
        tmp_path / "dangling.jsonl": f"{tmp_path}/nowhere.jsonl",
        tmp_path / "pipe.jsonl": "pipe",
        "/dev/null": "device",
        tmp_path / "two": "one format",
    }.items():
        sentence = refusal(path)
        assert named in sentence and str(path) in sentence


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"problem": 1},', "[{}] {}", '[{"score": NaN}]'])
def test_a_json_array_that_cannot_be_read_is_refused_by_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for policy in ("error", "skip"):
        assert refusal(tmp_path / "a.json", on_bad_record=policy).startswith(f"{tmp_path}/a.json: ")


def test_a_parquet_file_that_is_none_is_refused_by_its_name_and_a_nan_in_it_by_its_record(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, [{"problem": "p", "solution": "s", "answer": value} for value in (1.0, float("nan"))])
    assert refusal(file).startswith(f"{file}:2: field 'answer'")
    for content in (b"nothing of the kind", b"", file.read_bytes()[:-8]):
        file.write_bytes(content)
        for policy in ("error", "skip"):
            assert refusal(file, on_bad_record=policy).startswith(f"{file}: ")


def test_a_missing_file_of_any_format_is_never_sought_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for ending in WRITERS:
        assert f"data/problems{ending}" in refusal(f"data/problems{ending}")


def test_the_loading_script_of_a_hub_data_set_never_runs(tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(ValueError, match="could not be loaded as a hub data set"):
        list(records._hub_records(str(tmp_path / "evil"), "train", None))
    assert not (tmp_path / "ran").exists()


def test_every_kind_of_number_is_a_float_and_what_is_no_finite_number_is_refused():
    ones = [1, True, Fraction(1), Decimal(1), np.float32(1), np.float16(1), np.int64(1), np.bool_(True), np.array(1.0)]
    for value in [*ones, torch.tensor(1.0, dtype=torch.bfloat16), torch.ones(1, 1)]:
        assert (number := finite_number(value, "reward")) == 1.0 and type(number) is float
    none = [None, "1", b"1", 1j, [1], float("nan"), np.float32("inf"), 10**400, torch.ones(2)]
    for value in [*none, torch.tensor(float("nan"))]:
        with pytest.raises(ValueError, match="reward"):
            finite_number(value, "reward")


def test_whole_numbers_plain_scalars_and_texts_are_told_from_everything_else():
    found = [whole_number(value) for value in (2, np.int64(2), torch.tensor(2))]
    assert found == [2, 2, 2] and {type(number) for number in found} == {int}
    assert [whole_number(value) for value in (True, np.bool_(True), 2.0, np.float32(2), "2", None)] == [None] * 6
    several = torch.tensor([True])
    assert plain(np.bool_(True)) is True and plain(torch.tensor(False)) is False
    assert plain(several) is several and plain("x") == "x"
    assert text_or_none("🙂") == "🙂" and text_or_none(None) is None
    for value, named in (("cut \ud83d", "surrogate"), (3, "int")):
        with pytest.raises(ValueError, match=named):
            text_or_none(value)
