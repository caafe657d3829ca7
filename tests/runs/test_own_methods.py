# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The method of the user that docs/your_model.md shows: its test passes as it stands, and its runs train and resume."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import REPOSITORY, assert_resumes_equal, overrides, reproducible_metrics, start, train

PAGE = REPOSITORY / "docs" / "your_model.md"


def start_with_path(arguments: list[str], directory: str) -> int:
    """Call `tiny_run.start` with ``directory`` on the path of imports, as PYTHONPATH puts it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        return start(arguments)


@pytest.fixture
def written(tmp_path) -> Path:
    """Write the method and its test, the two code blocks of the page's section, into a directory."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Your own method\n")[2]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for name, text in zip(("my_method.py", "test_my_method.py"), blocks, strict=True):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_test_of_the_page_passes(written, monkeypatch):
    monkeypatch.syspath_prepend(written)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    [test] = [run for name, run in runpy.run_path(str(written / "test_my_method.py")).items() if name[:5] == "test_"]
    test()


@pytest.mark.full
def test_a_method_of_the_user_trains_and_resumes_with_a_setting_of_its_own(ranks, data, written):
    options: dict[str, Any] = {"start": start_with_path, "directory": str(written)}

    def arguments(run_dir: Path, weight: float = 0.0) -> list[str]:
        own = ["method.name=my_method.WrongFirst", f"method.right_weight={weight}", "num_steps=2"]
        own += ["checkpoint.save_every=1", "evaluation.verifier=tiny_run.starts_with_an_even_token"]
        return overrides(data, run_dir, *own)

    train(ranks, arguments(written / "one", 1.0), **options)
    train(ranks, arguments(written / "none"), **options)
    one, none = (reproducible_metrics(written / name)[0] for name in ("one", "none"))
    assert 0 < one["rewards/mean"] == none["rewards/mean"] < 1
    assert 0 < none["gradient_norm"] != pytest.approx(one["gradient_norm"], rel=1e-2)
    assert_resumes_equal(ranks, written / "none", arguments, step=1, num_steps=2, **options)
