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


def test_paths_that_hold_no_data_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "dangling.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.jsonl").write_bytes(as_jsonl(RECORDS))
    (tmp_path / "two" / "a.json").write_text(json.dumps(RECORDS))
    for path, words in {
        tmp_path: f"{tmp_path} with none; name other files with a glob",
        tmp_path / "notes.txt": "expected files ending in .jsonl, .json, .parquet, got ",
        tmp_path / "dangling.jsonl": f"which is a symbolic link to {tmp_path}/nowhere.jsonl, which does not exist",
        tmp_path / "pipe.jsonl": "pipe.jsonl, which is a named pipe",
        "/dev/null": "which is a device",
        tmp_path / "two": "data files of one format (.jsonl, .json, .parquet), got ",
    }.items():
        assert words in refusal(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"problem": "p", "solution": "s", "answer": NaN}', "(NaN, which JSON does not have"),
        (
            '{"messages": "' + "[" * 1000 + '", "solution": "s"}',
            "field 'messages': expected a list, got a text that is not its JSON",
        ),
    ],
)
def test_a_record_that_json_cannot_mean_is_bad_and_counted(tmp_path: Path, line: str, words: str) -> None:
    content = as_jsonl(RECORDS[:1]) + b"\n" + line.encode() + b"\n" + as_jsonl(RECORDS[1:])
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    message = refusal(file)
    assert message.startswith(f"{file}:3: ") and words in message
    assert message.endswith("; correct the record, or set data.on_bad_record=skip")
    found = load_problems(file, on_bad_record="skip")
    assert len(found) == 3 and [sentence.startswith(f"{file}:3: ") for sentence in found.skipped] == [True]


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"problem": 1},', "[{}] {}", '[{"score": NaN}]'])
def test_a_json_array_that_cannot_be_read_names_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for policy in ("error", "skip"):
        message = refusal(tmp_path / "a.json", on_bad_record=policy)
        assert message.startswith(f"{tmp_path}/a.json: expected a JSON array of records (")


def test_an_answer_of_nan_in_parquet_is_a_bad_record(tmp_path: Path) -> None:
    rows = [{"problem": "p", "solution": "s", "answer": value} for value in (1.0, float("nan"))]
    write_parquet(tmp_path / "a.parquet", rows)
    assert "a.parquet:2: field 'answer': expected a non-empty text or a number, got a number (NaN)" in refusal(
        tmp_path / "a.parquet"
    )


@pytest.mark.parametrize("name", ["no.parquet", "empty.parquet", "cut.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    WRITERS[".parquet"](file, RECORDS)
    file.write_bytes({"no": b"nothing of the kind", "empty": b"", "cut": file.read_bytes()[:-8]}[file.stem])
    for policy in ("error", "skip"):
        assert refusal(file, on_bad_record=policy).startswith(f"{file}: expected a Parquet file, got ")


def test_a_missing_file_of_any_format_is_never_sought_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for ending in WRITERS:
        assert "which matches none" in refusal(f"data/problems{ending}")


def test_the_loading_script_of_a_hub_data_set_never_runs(tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(ValueError, match="could not be loaded as a hub data set"):
        list(records._hub_records(str(tmp_path / "evil"), "train", None))
    assert not (tmp_path / "ran").exists()


NUMBERS = {
    "int": 1,
    "bool": True,
    "fraction": Fraction(1),
    "decimal": Decimal(1),
    "float32": np.float32(1),
    "float16": np.float16(1),
    "int64": np.int64(1),
    "NumPy's bool": np.bool_(True),
    "array without dimensions": np.array(1.0),
    "tensor without dimensions": torch.tensor(1.0, dtype=torch.bfloat16),
    "tensor of one number": torch.ones(1, 1),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_kind_of_number_is_a_float(kind):
    assert (number := finite_number(NUMBERS[kind], "reward")) == 1.0 and type(number) is float


@pytest.mark.parametrize(
    "value",
    [None, "1", b"1", 1j, [1], float("nan"), np.float32("inf"), torch.ones(2), torch.tensor(float("nan")), 10**400],
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^expected a finite number as reward, got "):
        finite_number(value, "reward")


def test_whole_numbers_are_ints_and_booleans_and_floats_are_none():
    found = [whole_number(value) for value in (2, np.int64(2), torch.tensor(2))]
    assert found == [2, 2, 2] and {type(number) for number in found} == {int}
    assert [whole_number(value) for value in (True, np.bool_(True), 2.0, np.float32(2), "2", None)] == [None] * 6


def test_a_scalar_becomes_plain_and_everything_else_stays():
    assert plain(np.bool_(True)) is True and plain(torch.tensor(False)) is False
    several = torch.tensor([True])
    assert plain(several) is several and plain("x") == "x"


def test_a_text_with_half_of_a_surrogate_pair_is_refused():
    assert text_or_none("🙂") == "🙂" and text_or_none(None) is None
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        text_or_none("cut \ud83d")
    with pytest.raises(ValueError, match=r"^expected a text or None, got a value of type int$"):
        text_or_none(3)
