# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/newest_versions.py reports the versions beyond the bounds of setup.py that nobody has tried."""

from __future__ import annotations

import datetime
import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tiny_run import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import newest_versions
from newest_versions import Release

TODAY = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
SETUP = 'REQUIREMENTS = ["torch>=2,<2.14"]\nEXTRAS = {"train": ["psutil", "hydra_core>=1.3,<1.4"]}\n'


def release(version: str, days: int, pythons: str = "") -> Release:
    return Release(Version(version), TODAY - datetime.timedelta(days), pythons)


def sentence(bound: str, served: list[Release], *tried: str) -> str | None:
    return newest_versions.untried("megatron-core", Version(bound), served, map(Version, tried), TODAY)


# -- what is reported ------------------------------------------------------------------------------------------------


def test_a_newer_minor_version_that_no_commit_has_tried_is_reported_with_its_age_and_its_pythons():
    served = [release("0.16.1", 200), release("0.19.0", 100), release("0.19.2", 2, ">=3.12")]
    assert sentence("0.17", served) == (
        "megatron-core 0.19 has been there since 2026-08-19 (Python >= 3.12), setup.py allows <0.17, no commit has "
        "tried it: raise the bound, or record in tools/tried_versions.toml why not"
    )


@pytest.mark.parametrize(
    ("bound", "served", "tried"),
    [
        ("0.17", [release("0.16.9", 100)], []),  # within the bound
        ("0.20", [release("0.19.2", 100)], []),
        ("0.17", [release("0.17.0", 30)], []),  # not more than 30 days
        ("0.17", [release("0.17.0", 31)], ["0.17"]),
        ("0.17", [release("0.17.0", 200), release("0.19.0", 31)], ["0.19"]),  # a record stands for all before it
        ("6", [release("5.24.0", 100)], []),
        ("6", [release("6.1.0", 31)], ["6"]),
    ],
)
def test_what_is_allowed_or_tried_or_new_is_not_reported(bound, served, tried):
    assert sentence(bound, served, *tried) is None


def test_the_bounds_are_those_of_all_extras_once_each():
    required = newest_versions.requirements(SETUP.replace('"psutil"', '"psutil", "torch<2.14"'))
    assert newest_versions.upper_bounds(required) == [("hydra_core", Version("1.4")), ("torch", Version("2.14"))]


def test_of_requirements_for_different_pythons_the_highest_bound_counts():
    lines = ['a<1; python_version < "3.12"', 'a<3; python_version >= "3.12"', 'b<1; python_version < "3.12"']
    everything = [*lines, 'b; python_version >= "3.12"', 'c<2; platform_system == "Linux"', "d<1", "d<2"]
    found = newest_versions.upper_bounds(map(Requirement, everything))
    assert [(name, str(bound)) for name, bound in found] == [("a", "3"), ("c", "2"), ("d", "1"), ("d", "2")]


def test_the_record_names_packages_with_bounds_and_says_what_was_found():
    text = newest_versions.TRIED.read_text(encoding="utf-8")
    names = {one.name for one in newest_versions.requirements(newest_versions.SETUP.read_text(encoding="utf-8"))}
    assert newest_versions.tried(text).keys() <= names
    with pytest.raises(ValueError, match="expected package, version, date and found"):
        newest_versions.tried('[[tried]]\npackage = "torch"\nversion = "2.15"\nfound = "no date"\n')


@pytest.fixture
def own_files(monkeypatch, tmp_path):
    """Let the script read a setup.py with two bounds, and a record of tried versions."""
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "tried_versions.toml").write_text("# none\n")
    monkeypatch.setattr(newest_versions, "SETUP", tmp_path / "setup.py")
    monkeypatch.setattr(newest_versions, "TRIED", tmp_path / "tried_versions.toml")


def test_the_script_fails_until_the_bound_or_the_record_has_the_version(own_files, monkeypatch, capsys):
    served = {"torch": [Release(Version("2.14.0"), TODAY - datetime.timedelta(88), ">=3.11")], "hydra-core": []}
    monkeypatch.setattr(newest_versions, "releases", lambda package: served[package.replace("_", "-")])
    assert newest_versions.main() == 1
    assert capsys.readouterr().out.startswith("[newest versions] torch 2.14 has been there since 2026-08-31 (Python >")
    newest_versions.TRIED.write_text(
        '[[tried]]\npackage = "torch"\nversion = "2.14"\ndate = 2026-11-27\nfound = "the loss differs"\n'
    )
    assert newest_versions.main() == 0
    newest_versions.TRIED.write_text("")
    newest_versions.SETUP.write_text(SETUP.replace("2.14", "2.15"))
    assert newest_versions.main() == 0
    assert "every newer version of 2 packages" in capsys.readouterr().out


def test_without_an_answer_the_script_ends_with_2_and_one_sentence_without_a_secret(own_files, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    assert newest_versions.main() == 2
    written = capsys.readouterr().err
    assert "does not answer: http://127.0.0.1:9/simple/hydra-core/: " in written and written.count("\n") == 1
    assert "secret" not in written
