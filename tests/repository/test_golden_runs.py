# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/golden_runs.py has a case for every recipe that differs in method, and finds a difference of one bit."""

from __future__ import annotations

import sys

import yaml
from tiny_run import REPOSITORY

from megatron_selfdistill.config.key_list import config_dir

sys.path.append(str(REPOSITORY / "tools"))
import golden_runs


def test_every_recipe_that_names_no_model_has_a_case_on_one_rank_and_one_on_four():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (config_dir() / "recipe").glob("*.yaml")}
    methods = {name for name, recipe in recipes.items() if not any("model" in str(d) for d in recipe["defaults"])}
    assert set(golden_runs.RECIPES) == methods and len(methods) >= 22
    assert {f"{name} on TP2 x PP2" for name in methods} <= golden_runs.CASES.keys()


def test_another_hash_and_a_missing_number_are_differences():
    one = {"steps": [{"loss/mean": "0x1p+0"}], "weights": "a", "checkpoint": "b"}
    assert golden_runs.differences(one, one) == []
    for hashed in ("weights", "checkpoint"):
        assert golden_runs.differences(one, {**one, hashed: "c"}) == [f"{hashed} differs"]
    (line,) = golden_runs.differences(one, {**one, "steps": [{}]})
    assert line.startswith("step 1, loss/mean: ")
