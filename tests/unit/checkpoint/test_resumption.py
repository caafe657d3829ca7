# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration of a run is compared with that of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_selfdistill.checkpoint.formats.saved_run import SavedRun
from megatron_selfdistill.checkpoint.resumption import (
    CONFIGURATION,
    PROMPTS,
    Resumption,
    _changed,
    _other_prompts,
    with_warmup,
)
from megatron_selfdistill.config import load
from megatron_selfdistill.config.bound_keys import stored_values


def saved_by(*arguments: str) -> SimpleNamespace:
    return SimpleNamespace(path="here", trainer_state={CONFIGURATION: stored_values(load(arguments))}, common={})


WARM_UP = "optimizer.lr_warmup_steps="


@pytest.mark.parametrize(
    ("num_steps", "given", "saved", "number"),
    [
        *((9, "", None, 0), (50, "", None, 5), (1000, "", None, 10), (1000, f"{WARM_UP}0", None, 0)),
        *((1000, "", f"{WARM_UP}0", 0), (1000, "", f"{WARM_UP}7", 7), (1000, f"{WARM_UP}3", f"{WARM_UP}7", 3)),
    ],
)
def test_a_run_keeps_the_warm_up_of_its_checkpoint_unless_it_is_set(num_steps, given, saved, number):
    config = load([f"num_steps={num_steps}", *given.split()])
    resumption = None if saved is None else Resumption(saved_by(saved), (), (), same_problems=True)
    assert with_warmup(config, resumption).optimizer.lr_warmup_steps == number


def test_a_warm_up_that_is_not_set_is_no_change():
    saved = saved_by(f"{WARM_UP}0")
    assert list(_changed(saved, load([]))) == []
    (change,) = _changed(saved, load([f"{WARM_UP}2"]))
    assert str(change) == f"{WARM_UP[:-1]}: 0 in the checkpoint, now 2"


def test_a_resumed_run_that_renders_other_prompts_says_so_and_how_to_fix_the_date():
    def lines(saved: dict[str, str], same_problems: bool = True) -> list[str]:
        found = Resumption(SavedRun(Path("/run/iter_1"), {}, {}, saved), (), (), same_problems)
        return list(_other_prompts(found, "today"))

    [line] = lines({PROMPTS: "yesterday"})
    assert "differ from those of /run/iter_1" in line and "data.chat_template_kwargs={date_string" in line
    assert lines({PROMPTS: "today"}) == lines({}) == lines({PROMPTS: "yesterday"}, same_problems=False) == []
