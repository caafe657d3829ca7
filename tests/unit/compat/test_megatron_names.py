# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/megatron_names.py: it knows what the package uses of Megatron Core, and notices what a version changes."""

from __future__ import annotations

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
    return list(dict.fromkeys(names.faults(root, [*in_files(package), RELIED_ON]).values()))


def test_a_version_with_everything_has_no_faults(tmp_path, package):
    assert found(tmp_path, package) == []


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
