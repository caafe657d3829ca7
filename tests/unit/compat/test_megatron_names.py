# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/megatron_names.py: it knows what the package uses of Megatron Core, and notices what a version changes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from scripts import load_script

TOOL = Path(__file__).resolve().parents[3] / "tools" / "megatron_names.py"
names = load_script(TOOL)
Use, Call = names.Use, names.Call
in_files = load_script(TOOL.with_name("megatron_uses.py")).in_files

MEGATRON = {
    "package_info.py": "MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = ''\n",
    "optim/__init__.py": "from .clip import clip as clip_grads\nfrom .config import Config, Fields\n",
    "optim/clip.py": "def clip(parameters, max_norm, *, norm=None, decoupled=False): ...\n_apex = None\n",
    "optim/config.py": (
        "from dataclasses import dataclass, field\nimport torch\n"
        "@dataclass\nclass Base:\n    size: int = 1\n"
        "@dataclass\nclass Config(Base):\n    fp8: str = field(default=None, metadata={})\n    flag: bool = False\n"
        "class Fields(torch.nn.Module):\n"
        "    def __init__(self, config):\n        self.decoder = config\n"
        "    def forward(self, ids, mask, *, context=None): ...\n    def _inner(self, x): ...\n"
    ),
}
PACKAGE = {
    "use.py": (
        "import functools\n"
        "import megatron.core.optim.clip as clip_module\n"
        "from megatron.core.optim import Config, Fields, clip_grads\n"
        "def replaced(parameters, max_norm, *, norm=None, decoupled=False): ...\n"
        "clip_module.clip = replaced\n"
        "def of(model: Fields | None, config: Config) -> None:\n"
        "    clip_grads(model.parameters(), 1.0, norm=2)\n"
        "    functools.partial(Config, flag=True)\n"
        "    model.decoder.anything, config.size, clip_module._apex\n"
        "    model._inner(1)\n"
        "def hidden(clip_module) -> None:\n    clip_module.no_name_of_megatron\n"
        "class Own(Fields):\n    added = 1\n"
        "def narrowed(model: Fields) -> None:\n    model.added\n"
    ),
}
RELIED_ON = Use("default", "megatron.core.optim.Config", detail="fp8=None", reason="no recipe sets it")


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return written(tmp_path / "megatron_selfdistill", PACKAGE)


def found(tmp_path: Path, package: Path, **changed: tuple[str, str]) -> list[str]:
    """Return the faults of a small Megatron in which ``file=(old, new)`` replaces a text."""
    files = dict(MEGATRON)
    for key, (old, new) in changed.items():
        name = next(name for name in files if name.endswith(f"{key}.py"))
        assert old in files[name]
        files[name] = files[name].replace(old, new)
    root = tmp_path / "root"
    written(root / "megatron" / "core", files)
    uses = [*in_files(package), RELIED_ON]
    return list(dict.fromkeys(names.faults(root, uses).values()))


def test_a_version_with_everything_has_no_faults(tmp_path, package):
    assert found(tmp_path, package) == []


def test_uses_are_found_in_files(package):
    uses = {str(use) for use in in_files(package)}
    assert {
        "import megatron.core.optim.clip_grads",
        "call megatron.core.optim.clip_grads(_, _, norm=)",
        "call megatron.core.optim.Config(flag=, ...)",
        "attribute megatron.core.optim.clip._apex",
        "member megatron.core.optim.Fields.decoder",
        "member megatron.core.optim.Config.size",
        "call megatron.core.optim.Fields._inner(_)",
        "replaced megatron.core.optim.clip.clip",
    } <= uses
    assert not any("anything" in use or "no_name_of_megatron" in use or "added" in use for use in uses)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"clip": ("_apex = None", "_no_apex = None")}, "megatron.core.optim.clip._apex is missing"),
        ({"clip": ("norm=None", "total_norm=None")}, "got an unexpected keyword argument 'norm'"),
        ({"clip": ("max_norm, *", "max_norm, group, *")}, "missing a required argument: 'group'"),
        ({"clip": ("parameters, max_norm", "parameters")}, "too many positional arguments"),
        ({"config": ("flag: bool", "mark: bool")}, "got an unexpected keyword argument 'flag'"),
        ({"config": ("self.decoder", "self.blocks")}, "megatron.core.optim.Fields.decoder is missing"),
        ({"config": ("size: int", "width: int")}, "megatron.core.optim.Config.size is missing"),
        ({"config": ("default=None", "default='e4m3'")}, "because no recipe sets it; the default is 'e4m3'"),
        ({"config": ("fp8: str", "fp4: str")}, "megatron.core.optim.Config has no parameter fp8"),
    ],
)
def test_a_change_of_a_version_is_one_fault(tmp_path, package, changed, fault):
    [sentence] = found(tmp_path, package, **changed)
    assert fault in sentence


@pytest.mark.parametrize(
    ("theirs", "ours", "fault"),
    [
        ("a, b=False, c=1.0", "a, b=False, c=1.0", None),
        ("a, b=False, c=1.0", "a, *others", None),
        ("a, b=False, d=1.0", "a, b=False, c=1.0", "has c in the place of d"),
        ("a, d=1, b=False", "a, b=False, d=1", "has b in the place of d"),
        ("a, b=False, c=1.0, d=None", "a, b=False, c=1.0", "has none in the place of d"),
        ("a, b=True", "a, b=False", "has b=False, expected Megatron's default True"),
    ],
)
def test_a_replacement_takes_what_megatron_passes(tmp_path, monkeypatch, theirs, ours, fault):
    root = written(tmp_path / "root", {"megatron/core/rope.py": f"def _rotate({theirs}): ..."})
    package = written(tmp_path / "megatron_selfdistill", {"own.py": f"def rotated({ours}): ..."})
    replacement = names.Replacement("own.py", "rotated")
    monkeypatch.setattr(names, "PACKAGE", package)
    monkeypatch.setitem(names.REPLACED, "megatron.core.rope._rotate", replacement)
    sentence = names.fault(root, Use("replaced", "megatron.core.rope._rotate"))
    assert sentence is None if fault is None else fault in sentence


def test_a_call_behind_a_value_without_a_type_names_its_places(tmp_path):
    files = {"a.py": "class A:\n    def f(self, x, y, *, z=1): ...", "package_info.py": MEGATRON["package_info.py"]}
    root = written(tmp_path / "megatron" / "core", files).parents[1]
    for text, fault in [("x, y, *, z", None), ("x, _", None), ("y", "expected the parameter y in the place of x")]:
        sentence = names.fault(root, Use("call", "megatron.core.a.A.f", Call.parse(text)))
        assert sentence is None if fault is None else fault in sentence


def test_names_of_some_versions_are_needed_in_these_only(monkeypatch):
    monkeypatch.setitem(names.SINCE, "megatron.core.a.New", "0.17")
    monkeypatch.setitem(names.UNTIL, "megatron.core.a.old", "0.19")
    monkeypatch.setitem(names.OLDER_ONLY, "compat/old.py", "0.19")
    needed = {
        use: [version for version in ("0.16.1", "0.17.0", "0.19.2") if names.concerns(use, version)]
        for use in (
            Use("member", "megatron.core.a.New.member"),
            Use("import", "megatron.core.a.old"),
            Use("import", "megatron.core.a.b", places=("compat/old.py:3",)),
            Use("import", "megatron.core.a.c", places=("compat/old.py:3", "compat/new.py:3")),
        )
    }
    older, every = ["0.16.1", "0.17.0"], ["0.16.1", "0.17.0", "0.19.2"]
    assert list(needed.values()) == [["0.17.0", "0.19.2"], older, older, every]


def test_the_tables_name_what_the_files_of_the_package_contain():
    tables = load_script(TOOL.with_name("megatron_uses.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in tables.PACKAGE.rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    members = [name for table in (tables.MEMBERS, tables.ASSIGNED) for text in table.values() for name in text.split()]
    assert len(members) > 150 and [name for name in members if name not in words] == []
    assert all(replacement.definition(tables.PACKAGE) for replacement in tables.REPLACED.values())


def test_every_name_that_the_package_uses_is_in_the_installed_version():
    root = names.installed("megatron")
    uses = names.uses()
    assert len(uses) > 400 and {use.kind for use in uses} == {
        *("import", "attribute", "member", "call", "replaced", "default")
    }
    assert list(names.faults(root, uses).values()) == []


def test_a_table_shows_each_version_and_the_exit_status_tells_of_faults(tmp_path, monkeypatch, capsys, package):
    root = written(tmp_path / "root" / "megatron" / "core", MEGATRON).parents[1]
    monkeypatch.setattr(names, "uses", lambda: [RELIED_ON, Use("import", "megatron.core.gone")])
    assert names.main([str(root), str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "use | 0.16.1 | 0.16.1" and "import megatron.core.gone | FAULT | FAULT" in lines
    assert lines[-1] == "2 uses of Megatron Core 0.16.1, 0.16.1: 2 faults"
    monkeypatch.setattr(names, "uses", lambda: [RELIED_ON])
    assert names.main(["--faults", str(root)]) == 0
    assert capsys.readouterr().out == "1 uses of Megatron Core 0.16.1: no faults\n"
    assert names.main([str(root / "megatron")]) == 2


def test_signatures_that_change_are_shown(tmp_path, package):
    old = written(tmp_path / "old" / "megatron" / "core", MEGATRON).parents[1]
    files = MEGATRON | {
        "optim/clip.py": MEGATRON["optim/clip.py"].replace("norm=None", "norm=0"),
        "package_info.py": "MAJOR = 0\nMINOR = 19\nPATCH = 2\n",
    }
    new = written(tmp_path / "new" / "megatron" / "core", files).parents[1]
    shown = names.changes([old, new], list(in_files(package)))
    assert shown[:2] == ["megatron.core.optim.clip.clip", "    0.19.2: -norm=None, +norm=0"]


LOCK = """# megatron-core==0.1
[project]
absl-py==2.5.1
megatron-core==0.16.1; python_version < "3.12"
megatron-core==0.19.2; python_version >= "3.12"
[vllm]
megatron-core==0.18.0
"""


def test_the_tested_versions_are_those_of_the_project():
    assert names.tested_versions(LOCK) == ["0.16.1", "0.19.2"]
    assert len(names.tested_versions(names.LOCK.read_text())) >= 1


def test_an_unpacked_wheel_is_read_again_without_pip(tmp_path, monkeypatch):
    (tmp_path / "megatron_core-0.99.0").mkdir()
    monkeypatch.setattr(subprocess, "run", None)
    assert names.root_of("0.99.0", tmp_path) == tmp_path / "megatron_core-0.99.0"


def test_a_version_that_pip_cannot_download_is_one_line_and_a_status(tmp_path, monkeypatch, capsys):
    ended = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    monkeypatch.setattr(names, "CACHE", tmp_path)
    assert names.main(["--versions", "0.99.0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith(": ERROR: No matching distribution found\n")
    assert "could not download megatron-core==0.99.0, which needs a network once" in error
    assert list(tmp_path.iterdir()) == []
