# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A Hugging Face directory of a run has its chat template, and a line names what no such directory can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop import conversion
from megatron_selfdistill.interop.conversion import write_prompt_settings

TEMPLATE = "{% for m in messages %}<U>{{ m.content }}</U>{% endfor %}"


def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any] | None) -> tuple[str, list[str]]:
    """Return the directory's template and the lines, for a run whose configuration has ``data``; None is no run."""
    run, out = tmp_path / "run", tmp_path / "out"
    checkpoint = run / "checkpoints" / "iter_0000001"
    for path in (checkpoint, out):
        path.mkdir(parents=True, exist_ok=True)
    (out / "chat_template.jinja").write_text("that of the model")

    def read(path: Path) -> SavedRun:
        if data is None:
            raise CheckpointError("no run")
        return SavedRun(path, {}, {}, {"configuration": {"data": data}})

    monkeypatch.setattr(conversion, "read_saved_run", read)
    lines: list[str] = []
    write_prompt_settings(checkpoint, out, lines.append)
    return (out / "chat_template.jinja").read_text(), lines


def test_the_template_of_the_run_goes_before_that_of_the_model(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "chat_template.jinja").write_text(TEMPLATE)
    found, lines = exported(tmp_path, monkeypatch, {"chat_template": "template.jinja", "student_template": "{problem}"})
    assert found == TEMPLATE and lines == [
        "chat_template.jinja is the chat template behind which the run trained (data.chat_template)"
    ]


def test_what_no_file_can_hold_is_named_with_its_value(tmp_path, monkeypatch):
    data = {
        "system_prompt": "Be brief.",
        "chat_template_kwargs": {"enable_thinking": False},
        "student_template": "Q: {problem}",
        "views": {"student": {"generation_prompt": "A:"}, "teacher": {"system_prompt": "Unseen."}},
    }
    _, [line] = exported(tmp_path, monkeypatch, data)
    assert line == (
        "no file can hold what else shaped the prompts of the run; repeat it where you serve: data.system_prompt=Be "
        "brief.; data.chat_template_kwargs={'enable_thinking': False}; data.student_template=Q: {problem}; "
        "data.views.student.generation_prompt=A:"
    )
