# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of the literature, and methods of the user, as whole runs: resumed, and equal in other layouts.

Some of the recipes write hints on the way: by functions, from a bank of skills, and from the next messages of logs.
"""

from __future__ import annotations

import itertools
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiers import combinations
from tiny_run import REPOSITORY, TWO_RANKS, assert_steps_equal, reproducible_metrics, start, write_conversations

VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
REWARDED = {"grpo", "sdpo", "opsd_rl", "pi_distill", "scope", "uni_opd", "rlcsd", "rlt", "sod", "ovd", "past", "skald"}
WITH_POLICY_TERM = REWARDED - {"sdpo"} | {"beta_opsd", "opsa", "tip"}
REPLICATED = {"grpo", "scope", "uni_opd", "rlcsd", "sod", "ovd", "tip", "dapd", "past", "skald"}
RECIPES = sorted(
    {"beta_opsd", "dapd", "edge_opd", "eopd", "iw_opd", "opsa", "pw_opsd", "sdft", "opsd", "rft", "sr_opsd", "tip"}
    | {"esr", "u_opsd", "veto"}
    | REWARDED
)
OWN = {
    "beta_opsd": ["method.signal=advantage", "method.discount=0.9"],
    "rlcsd": ["rollout.max_new_tokens=24"],  # enough that most responses end, and can be hints
    "eopd": ["method.threshold=2.47"],  # an untrained teacher's entropies lie on both sides
    "esr": ["rollout.horizon=[2,6,2]"],
    "rlt": ["method.closing_tag=-"],  # a character that an untrained model writes now and then
    "u_opsd": ["method.threshold=0.2"],  # one response that ends is a majority of the others, which do not
    "sod": ["environment.name=replying.Replying", "environment.max_turns=3"],
    "past": ["method.hint_template='{attempt}|{solution}'", "method.teacher_steps=1"],  # both kinds of steps
    "skald": ["method.num_hinted=3"],
    "ovd": ["method.template='{problem}{response}|'", "method.step_separator=','"],
}
TINY = ("rollout.max_new_tokens=10", "optimizer.lr_warmup_steps=0", "checkpoint.save_every=1", "num_steps=2")
ON_POLICY = ("data.global_batch_size=4", "rollout.num_samples=4", "rollout.temperature=1", VERIFIED)
JUDGED = ["recipe=openclaw", "data.global_batch_size=6", "method.judge=hint_functions.hint_of", "method.min_length=3"]
HINTED = {
    "function": ["recipe=opsd_rl", "method.name=sdpo", "method.hints=hint_functions.first_right_text"],
    "selection": ["recipe=opsd", "method.select=hint_functions.without_last_character"],
    "sdpo_feedback": ["recipe=sdpo_feedback", "environment.name=replying.Replying"],
    "skill_sd": ["recipe=skill_sd", "method.keep=2", "method.summarizer=hint_functions.skill_of"],
    "openclaw": [*JUDGED, "method.reward=hint_functions.reward_of_reply"],
    "full": [*JUDGED, "method.weight=0", "method.signal=full"],
    "asked": [*JUDGED[:2], "method.judge_template='{role}{response}{next_state}'"],
}
LOGGED = ("openclaw", "full", "asked")
LAYOUT_OF = dict(zip(RECIPES, itertools.cycle(["CP2", "PP2", "TP2"]), strict=False))
"""A layout for every recipe.  The recipes of `REPLICATED` run with replicas, too."""
LAYOUTS = [
    *LAYOUT_OF.items(),
    *((recipe, "DP2") for recipe in sorted(REPLICATED)),
    *(("function", "PP2"), ("skill_sd", "DP2"), ("skill_sd", "TP2"), ("openclaw", "DP2"), ("openclaw", "CP2")),
    ("full", "PP2"),
]
COMPARED = tuple("terms/ rewards/ hints/ loss/ correction/ explanations/ episodes/ verbal/ skills/ retries/".split())


@pytest.fixture(scope="module")
def of(own_data, start) -> Callable[[str], list[str]]:
    """Return a function from the name of a run to its options.  The logs have an answer, a correction and thanks."""
    from _lib import subtraction

    chats = [
        (subtraction.problem_text(a, b), f"{number:03d};", "X", subtraction.answer(a, b), "thanks")
        for number, (a, b) in enumerate(subtraction.distinct(30, "train", seed=1))
    ]
    write_conversations(own_data, [*chats, chats[0][:2]], "hindsight.jsonl")
    logs = [f"data.path={own_data}/hindsight.jsonl", f"data.chat_template={own_data}/template.jinja"]

    def options(name: str) -> list[str]:
        if name in HINTED:
            data = logs if name in LOGGED else ON_POLICY
            return [start, *TINY, "data.on_long_context=truncate_end", *data, *HINTED[name]]
        own = [f"recipe={name}", *OWN.get(name, [])]
        return [start, *TINY, "data.on_long_context=drop", *ON_POLICY, *own]

    return options


@pytest.mark.full
@combinations(recipe=RECIPES)
def test_a_recipe_trains_and_resumes_bit_for_bit(runs, of, recipe):
    for step in reproducible_metrics(runs(*of(recipe))):
        assert step["gradient_norm"] > 0
        assert ("terms/policy_mean" in step) == (recipe in WITH_POLICY_TERM)
        assert ("rewards/mean" in step) == (recipe in REWARDED | {"rft"})
        assert step.get("episodes/turns_mean", 1) > 1 or recipe != "sod"
    if recipe == "ovd":
        assert max(step["verbal/replaced"] for step in reproducible_metrics(runs(*of(recipe)))) > 0
    runs.resumed(*of(recipe), step=1)


@combinations(name=list(HINTED), quick={"name": ["skill_sd"]}, strength=1)
def test_a_run_that_writes_hints_trains_and_resumes_bit_for_bit(runs, of, name):
    lines = reproducible_metrics(runs(*of(name)))
    for line in lines:
        assert line["gradient_norm"] > 0 or (name == "asked" and line["rewards/mean"] == 0)
        assert ("hints/share" in line) == (name != "selection")
        assert ("terms/policy_mean" in line) == (name not in ("selection", "full", "sdpo_feedback"))
    if name == "skill_sd":
        counts = [line["skills/count"] for line in lines]
        assert counts == sorted(counts) and counts[0] == 0 < counts[1] <= counts[-1]
        assert lines[0]["hints/share"] == 0
    if name == "sdpo_feedback":
        assert all(line["hints/share"] == line["rewards/trained_share"] for line in lines)
    if name in ("function", "openclaw", "full"):
        assert all(0 < line["hints/share"] < 1 for line in lines)
    if name == "openclaw":
        assert all(line["rewards/trained_share"] == 1 for line in lines)
        assert all(line["rewards/mean"] == pytest.approx(1 - 2 * line["hints/share"]) for line in lines)
        assert all(line["terms/clipped_share"] == 0 for line in lines), "the ratio of logged replies is 1"
    if name == "full":
        assert all(line["turns/count"] == pytest.approx(6 * line["hints/share"]) for line in lines)
    runs.resumed(*of(name), step=1)


@pytest.mark.full
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_terms_and_hints_are_equal_in_every_layout(runs, of, name, layout):
    if name in LOGGED:
        other = runs(*of(name), *TWO_RANKS[layout], world_size=2)
    else:
        other = runs.replayed(*of(name), more=TWO_RANKS[layout])
    assert_steps_equal(runs(*of(name)), other, COMPARED)


@pytest.mark.full
def test_responses_that_state_their_confidence_train_and_resume_bit_for_bit(runs, of, tmp_path):
    from _lib import subtraction
    from _lib.pretraining import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer", subtraction.TASK.alphabet + "CNfidencTheomprcalqusxv.:' \n")
    options = [f"data.tokenizer={tmp_path}/tokenizer", "data.student_template='{problem}'", "schedule.max_tokens=1024"]
    options += ["rollout.max_new_tokens=64", "model.max_position_embeddings=512"]
    whole = [*of("caopd")[1:], *options]  # from random weights
    for step in reproducible_metrics(runs(*whole)):
        assert step["gradient_norm"] > 0 and 0 < step["rewards/trained_share"] < 1
        assert "sampler/log_prob_mean_abs_diff" not in step, "the sampler knows nothing of the edited texts"
    runs.resumed(*whole, step=1)


def start_with_path(arguments: list[str], directory: str) -> int:
    """Call `tiny_run.start` with ``directory`` on the path of imports, as PYTHONPATH puts it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        return start(arguments)


@pytest.fixture
def written(tmp_path) -> Path:
    """Write the method and its test, the two code blocks of a section of docs/your_model.md, into a directory."""
    page = (REPOSITORY / "docs" / "your_model.md").read_text(encoding="utf-8")
    section = page.partition("\n## Your own method\n")[2]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for name, text in zip(("my_method.py", "test_my_method.py"), blocks, strict=True):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_test_of_a_method_of_the_user_on_the_page_passes(written, monkeypatch):
    monkeypatch.syspath_prepend(written)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    [test] = [run for name, run in runpy.run_path(str(written / "test_my_method.py")).items() if name[:5] == "test_"]
    test()


@pytest.mark.full
def test_a_method_of_the_user_trains_and_resumes_with_a_setting_of_its_own(runs, written):
    how: dict[str, Any] = {"start": start_with_path, "directory": str(written)}
    own = ["method.name=my_method.WrongFirst", "num_steps=2", "checkpoint.save_every=1", VERIFIED]
    weights = [[*own, f"method.right_weight={weight}"] for weight in (0.0, 1.0)]
    none, one = (reproducible_metrics(runs(*options, **how))[0] for options in weights)
    assert 0 < one["rewards/mean"] == none["rewards/mean"] < 1
    assert 0 < none["gradient_norm"] != pytest.approx(one["gradient_norm"], rel=1e-2)
    runs.resumed(*weights[0], step=1, **how)
