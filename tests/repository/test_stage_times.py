# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""CI writes the seconds of each stage, asks for those of stages that it runs, and names tests that exist."""

from __future__ import annotations

import json
import re

from tiny_run import REPOSITORY


def test_ci_writes_every_stage_to_the_file_that_it_compares_at_the_end():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    body = re.search(r"^stage\(\) \{\n(.*?)^\}", script, re.MULTILINE | re.DOTALL)
    assert body is not None and '>>"$times"' in body[1]
    assert "tools/stage_times.py" in script.rpartition("\nfinish\n")[2], "after the stages beside the others"
    assert set(json.loads((REPOSITORY / ".ci" / "stage_seconds.json").read_text())) == {"calibration", "stages"}


def test_ci_asks_for_the_seconds_of_stages_that_it_runs():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    in_turn = re.search(r"^IN_TURN=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)
    assert in_turn is not None
    lines = [line.strip().strip('"').partition(" ") for line in in_turn[1].splitlines()]
    recorded = json.loads((REPOSITORY / ".ci" / "stage_seconds.json").read_text())["stages"]
    assert len(lines) > 4 and {name for _, _, name in lines} <= set(recorded)
    for function, _, _ in lines:
        assert re.search(rf"^{function}\(\) \{{", script, re.MULTILINE), function


def test_ci_names_tests_that_exist():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    named = re.findall(r"tests/[\w/]+(?:\.py::\w+)?", script)
    assert len(named) > 5
    for file, _, function in (name.partition("::") for name in named):
        assert (REPOSITORY / file).exists(), file
        assert not function or f"def {function}(" in (REPOSITORY / file).read_text(encoding="utf-8"), function
