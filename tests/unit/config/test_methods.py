# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The registry of methods: what is a method, what its settings are, and what its import may load."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_selfdistill import methods
from megatron_selfdistill.config import load, method_class
from megatron_selfdistill.config.key_list import keys, method_keys
from megatron_selfdistill.config.methods import method_names, settings_class, settings_of
from megatron_selfdistill.config.schema.method_config import MethodSettings, Needs
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.methods.default import SelfDistillation

FILES = sorted(file.stem for file in Path(methods.__file__).parent.glob("*.py") if file.stem != "__init__")
MODULE = """
from dataclasses import dataclass
from megatron_selfdistill.methods.default import DefaultSettings, SelfDistillation

@dataclass(frozen=True)
class Settings(DefaultSettings):
    \"\"\"The settings of a method of a user.\"\"\"

    size: int = 3
    \"\"\"The size.\"\"\"

class Mine(SelfDistillation):
    Settings = Settings

class Unmade:
    Settings = Settings

class Bare:
    pass
"""


@pytest.fixture
def of_a_user(tmp_path, monkeypatch):
    """Put the module ``methods_of_a_user`` on the path of imports."""
    (tmp_path / "methods_of_a_user.py").write_text(MODULE)
    (tmp_path / "ending_method.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    method_class.cache_clear()
    for name in ("methods_of_a_user", "ending_method"):
        sys.modules.pop(name, None)


def test_every_file_of_the_package_is_a_method():
    assert method_names() == FILES and {"default", "grpo", "sod"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_class_of_a_method_has_settings_with_its_name(name):
    found = method_class(name)
    own = f"megatron_selfdistill.methods.{name}"
    assert (found.__module__ == own or found is SelfDistillation) and issubclass(found, SelfDistillation)
    assert found.Settings is settings_class(name) and issubclass(found.Settings, MethodSettings)
    settings = settings_of({"name": name})
    assert settings.name == name and isinstance(settings.needs, Needs)
    for key, (_, doc, _) in method_keys(name).items():
        assert doc.endswith("."), f"{key} of {name} has no documentation"


def test_the_core_has_208_keys_and_a_method_can_ask_for_ten_things_of_the_core_at_most():
    """What one method or one instrument reads, or Megatron alone, is a setting of a method or an entry of a mapping."""
    assert len(keys()) <= 208 and len(dataclasses.fields(Needs)) <= 10


def test_a_dotted_path_is_a_class_of_the_user_with_settings_of_its_own(of_a_user):
    config = load(["method.name=methods_of_a_user.Mine", "method.size=4"])
    assert (config.method.name, config.method.size) == ("methods_of_a_user.Mine", 4)
    assert method_class("methods_of_a_user.Mine").__name__ == "Mine"
    assert config.needs == load([]).needs


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("method.name=gpro", "method.name must be"),
        ("method.name=parts", "method.name must be"),
        ("method.name=", "method.name must be"),
        ("method.name=methods_of_a_user.Unmade", "methods_of_a_user.Unmade must be .* made"),
        ("method.name=methods_of_a_user.Bare", "methods_of_a_user.Bare must be .* Settings"),
        ("method.name=methods_of_a_user.Missing", "methods_of_a_user.*'Missing'"),
        ("method.name=ending_method.Mine", "ending_method.Mine"),
        ("method.name=methods_of_a_user.Mine method.sizes=4", "'method.size'"),
        ("method.name=methods_of_a_user.Mine method.size=x", "^method.size"),
        ("recipe=sod method.turn_gian=0.3", "'method.turn_gain'"),
    ],
)
def test_what_is_no_method_or_no_setting_of_it_is_refused_by_its_name(of_a_user, overrides, named):
    with pytest.raises(ConfigError, match=named):
        load(overrides.split())
    with pytest.raises(ConfigError, match=r"method.name=grpo: other, turn_gain$"):
        settings_of({"name": "grpo", "turn_gain": 0.3, "other": 1})


def loaded_by(module: str) -> set[str]:
    """Return the libraries that the import of ``module`` loads in a new process."""
    heavy = ["torch", "megatron", "transformers", "datasets"]
    code = f"import json, sys, {module}; print(json.dumps(sorted(set({heavy}) & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_default_method_and_its_configuration_load_no_torch():
    assert loaded_by("megatron_selfdistill.methods.default, megatron_selfdistill.config") == set()


@pytest.mark.full
def test_no_method_loads_megatron_or_the_libraries_of_hugging_face():
    assert loaded_by(", ".join(f"megatron_selfdistill.methods.{name}" for name in FILES)) <= {"torch"}
