# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the first step of a run would see: the numbers equal those of transformers and float64 code, in every layout."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_run
import torch
from logit_pairs import by_bisection, entropy, kl
from tiers import combinations
from torch import Tensor

from megatron_selfdistill import config as configuration
from megatron_selfdistill.commands.given_model import configured, find_model
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed import ranks as grids
from megatron_selfdistill.evaluation.evaluation_result import Overlooked, ProblemResult, Verdict
from megatron_selfdistill.evaluation.inference import open_inference
from megatron_selfdistill.instruments.evaluate import evaluate_command as tool
from megatron_selfdistill.instruments.evaluate.first_step import (
    GUIDED,
    FirstStep,
    first_step,
    measure_first_step,
    possible_controls,
    readiness,
    recommended,
)
from megatron_selfdistill.loss import Target

TEMPLATE = "data.teacher_template='{problem}H{solution}|'"
CONTROLS = 6
"""The number of controls: all other problems, so that no draw decides which."""
Samples = list[tuple[list[int], list[list[int]], list[int], bool]]
"""Per sample: the student's prompt, the teacher's with the problem's own hint and then with each other hint, the
tokens, and whether the sample was cut."""


@pytest.fixture(scope="module")
def directory(untrained, tmp_path_factory) -> Path:
    directory = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("first_step"), dirs_exist_ok=True))
    tiny_run.write_data(directory, 1 + CONTROLS)
    return directory


def is_even(response: str, problem: Problem | None = None) -> bool:
    return len(response) % 2 == 0


def measured(directory: Path, *options: str) -> tuple[FirstStep, Samples]:
    """Return the first step, and the samples of this replica."""
    given = ["--megatron", str(directory / "megatron"), "--data", str(directory / "problems.jsonl"), "--hinted"]
    settings = ["optimizer=fp32", "rollout.max_new_tokens=9", "rollout.temperature=0.8", TEMPLATE]
    settings += [f"target.num_controls={CONTROLS}", *options]
    arguments = tool.evaluation_arguments([*given, "--out", str(directory / "out"), *settings])
    model = find_model(arguments.hf, arguments.megatron, None)
    config = configured(*tool.checked(arguments), model)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, load=model["path"]))
    run_data, drawn = RunData.load_evaluation(config, True), []
    grid = grids.initialize(config.parallel, config.seed)
    with open_inference(config, run_data, grid) as inference:
        generate = inference.sampler.generate

        def recorded(requests, params):
            responses = generate(requests, params)
            drawn.extend(zip(requests, responses, strict=True))
            return responses

        inference.sampler.generate = recorded
        found = measure_first_step(inference, config, run_data, is_even, grid)
    problem_of = {tuple(run_data.builder.student_prompt(it)): it for it in run_data.evaluation}
    samples = []
    for request, response in drawn:
        own = problem_of[tuple(request.prompt)]
        hints = [own.solution, *(it.solution for it in run_data.evaluation if it.solution != own.solution)]
        hinted = [run_data.builder.teacher_prompt(own, hint) for hint in hints]
        samples.append((list(request.prompt), hinted, list(response.token_ids), response.truncated))
    return found, samples


def logits_of(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Return the logits [len(response), V] that predict the response, in float64."""
    with torch.no_grad():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()


def expected(directory: Path, samples: Samples, contrasted: bool) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float64)
    decode = AutoTokenizer.from_pretrained(directory / "tokenizer").decode
    texts = [decode(ids[:-1], skip_special_tokens=True) for *_, ids, is_cut in samples if not is_cut]
    solutions = {json.loads(line)["solution"] for line in (directory / "problems.jsonl").read_text().splitlines()}
    student = torch.cat([logits_of(model, plain, ids) for plain, _, ids, _ in samples])
    teacher, *controls = (
        torch.cat([logits_of(model, hinted[k], ids) for _, hinted, ids, _ in samples]) for k in range(1 + CONTROLS)
    )
    tokens = torch.tensor([token for *_, ids, _ in samples for token in ids])
    log_p, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    control_logits = torch.stack(controls)
    of_teacher, log_c = kl(log_t, log_p), control_logits.softmax(-1).mean(0).log()
    top = of_teacher.argsort(descending=True)[: -(-len(tokens) // 10)]
    told = {"controls": control_logits} if contrasted else {}
    of_target = kl(by_bisection(student, teacher, Target(anchor="student"), **told)[0], log_p)
    return {
        "num_samples": len(samples),
        "num_tokens": len(tokens),
        "log_prob_mean": log_p[range(len(tokens)), tokens].mean().item(),
        "entropy_mean": entropy(log_p).mean().item(),
        "truncated_share": sum(is_cut for *_, is_cut in samples) / len(samples),
        "loop_share": 0.0,  # 9 tokens are too few
        "teacher_kl": of_teacher.mean().item(),
        "accuracy": sum(map(is_even, texts)) / len(samples),
        "num_hints": len(solutions),
        "vocab_size": 23,
        "let_through": (of_target.sum() / of_teacher.sum()).item(),
        "let_through_top_tenth": (of_target[top].sum() / of_teacher[top].sum()).item(),
        "general_kl": kl(log_c, log_p).mean().item(),
        "specific_kl": kl(log_t, log_c).mean().item(),
    }


LAYOUTS = {
    "one rank": (1, []),
    "fused, one token at a time": (1, ["loss.fused=low_memory", "loss.fused_chunk_tokens=5"]),
    "a target with controls": (1, ["target.control=other"]),
} | {name: (2, tiny_run.TWO_RANKS[name]) for name in ("DP2", "TP2", "PP2")}


@combinations(layout=list(LAYOUTS), quick={"layout": ["TP2"]}, strength=1)
def test_the_numbers_are_those_of_transformers_in_float64(directory, ranks, layout):
    world_size, options = LAYOUTS[layout]
    results = ranks.run(measured, directory, *options, world_size=world_size, init_process_group=False)
    assert len({str(found) for found, _ in results}) == 1, "the same on every rank"
    samples = [sample for _, of_rank in results for sample in of_rank] if layout == "DP2" else results[0][1]
    found, wanted = dataclasses.asdict(results[0][0]), expected(directory, samples, "target.control=other" in options)
    assert found.pop("why_no_controls") is None and found["specific_kl"] > 0.01
    assert 0 < found["truncated_share"] < 1 and 0 < found["accuracy"] < 1
    shares = ("let_through", "let_through_top_tenth")
    assert sum(found.pop("are_right")) == round(wanted["accuracy"] * 7)
    for share in shares:
        assert 0 < found[share] < 1 and found.pop(share) == pytest.approx(wanted.pop(share), rel=1e-3)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_there_is_no_advice_about_the_share_of_a_hint_that_changes_nothing_or_is_that_of_all_problems():
    tokens = torch.tensor([[-1.0, 1.0, 1e-9, 1e-12]], dtype=torch.float64)
    found = first_step(tokens, [False], [False], [True], 1, 23)
    assert found.let_through is None and found.let_through_top_tenth is None and found.advice(Config()) == []
    little = torch.tensor([[-1.0, 1.0, 0.5, 0.01]], dtype=torch.float64)
    of_hints = [first_step(little, [False], [False], [True], number, 23).advice(Config()) for number in (1, 2)]
    assert of_hints[0] == [] and "lets 2.0% of the hint through" in of_hints[1][0]


@pytest.mark.parametrize(
    ("settings", "hints", "why"),
    [
        (["target.control=auto"], "aa", "all 2 hints are one text"),
        (["target=teacher_alone"], "ab", "target.rule=teacher_alone"),
        (["data.solutions=none"], "ab", "method.name=default"),
    ],
)
def test_where_other_hints_make_no_control_the_reason_is_said(settings, hints, why):
    problems = [tiny.problem(solution=hint) for hint in hints]
    number, found = possible_controls(configuration.load(["data.path=x", *settings]), problems)
    assert number == 0 and why in found


@pytest.mark.parametrize(
    ("num_hints", "accuracy", "hinted", "wanted"),
    [
        (1, 0.0, 0.9, {"target.anchor=student"}),  # one text for all problems: nothing about a single one can leak
        (2, 0.5, 0.9, set()),
        (12, 0.01, 0.2, set(GUIDED)),
        (12, 0.02, 0.9, set()),  # the base solves some: the default finds them
        (12, 0.0, 0.19, set()),  # and a hint that does not help gives no reason to let it through
    ],
)
def test_the_recommended_target_follows_from_the_hints_and_both_accuracies(num_hints, accuracy, hinted, wanted):
    found = recommended(num_hints, 12, accuracy, hinted)
    assert set(found.overrides) == wanted
    sampled = ["rollout.temperature=0.7", "rollout.top_k=40", "rollout.top_p=0.9"]
    configuration.load(["data.path=problems.jsonl", *sampled, *found.overrides])  # the settings fit together
    assert str(found).startswith(f"{' '.join(found.overrides) or 'the default target'}, since ")
    assert recommended(1, 1, 0.5, 0.5).overrides == (), "the hint of one problem says nothing about the hints"


def judged(plain, hinted, *, cut=0.0, entropy=1.0, num_hints=9, overlooked=None, settings=()):
    """Return the readiness for 0 or 1 without the hint and the right ones of four with it, per problem."""

    def verdicts(right: int) -> list[Verdict]:
        return [Verdict(place < right, 5, False, None) for place in range(4)]

    seen, share = tuple(map(bool, plain)), sum(plain) / len(plain)
    first = FirstStep(len(plain), 99, -1.0, entropy, 0.0, 0.0, 0.3, share, seen, num_hints, 64, 0.3, 0.3)
    problems = [ProblemResult(str(place), verdicts(right)[0], verdicts(right)) for place, right in enumerate(hinted)]
    result = SimpleNamespace(
        problems=problems, overlooked=overlooked, sampled_truncated_share=cut, greedy_truncated_share=cut
    )
    return readiness(configuration.load(["data.path=x", *settings]), first, result)


def test_a_hint_that_clearly_helps_is_worth_a_run_and_its_gain_is_that_of_the_same_problems():
    ready = judged([1, 0, 0, 0, 0, 0], [4, 4, 3, 2, 4, 4, 0, 0])  # the last two problems have no sample without a hint
    assert not ready.cause and ready.gain.mean == pytest.approx(21 / 24 - 1 / 6)


NOTHING = {"plain": [0] * 12, "hinted": [0] * 12}
STRICT = {"overlooked": Overlooked(60, 43, []), "settings": ("evaluation.verifier=exact_match",)}


@pytest.mark.parametrize(
    ("given", "cause", "change"),
    [
        ({"plain": [0] * 11 + [1], "hinted": [0] * 10 + [4, 4]}, "12 problems are too few", "more"),
        ({"plain": [0, 0], "hinted": [4, 4]}, "2 problems are too few", "--data"),
        ({"plain": [0] * 64, "hinted": [1, 0] * 32}, "helps too little: 12%", "data.fields.solution"),
        (NOTHING | {"cut": 0.5}, "50% of the responses", "rollout.max_new_tokens=512"),
        ({"plain": [1] * 12, "hinted": [4] * 12}, "solves these problems without the hint", "harder"),
        (NOTHING | {"num_hints": 1}, "all hints are one text", "evaluation.verifier"),
        (NOTHING | STRICT, "43 of them mention the answer", "evaluation.verifier=math_verify"),
        ({"plain": [0] * 12, "hinted": [4] * 12, "entropy": 0.91 * math.log(64)}, "untrained", "data.tokenizer=DIR"),
    ],
)
def test_a_run_that_would_teach_little_has_one_cause_and_one_change(given, cause, change):
    ready = judged(**given)
    assert cause in ready.cause and change in ready.change
