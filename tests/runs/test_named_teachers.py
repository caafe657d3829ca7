# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with several teachers, whose weights are not those that the student starts from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rounded_json import read_lines
from taught import gradients_by_definition, trained_gradients, write_records_of_teachers
from tiers import combinations
from tiny_run import (
    TWO_RANKS,
    assert_equal_runs,
    assert_guided_by_the_teacher_of_the_loss,
    assert_steps_equal,
    bytes_of,
    refusal,
    reproducible_metrics,
    train,
    with_trainer,
)

from megatron_selfdistill.interop.conversion import megatron_to_hf
from megatron_selfdistill.interop.peft_adapters import megatron_to_peft
from megatron_selfdistill.teachers.teachers_config import joins

FULL = pytest.mark.full
LAYOUTS = TWO_RANKS | {
    "DP2": ["schedule.max_tokens=64"],
    "PP2xVPP2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
}
SP = "parallel.sequence_parallel=true"
FUSED_TP2 = [*TWO_RANKS["TP2"], SP, "loss.fused=low_memory"]
FOUR_LAYERS = "model.num_layers=4"
WIDE = (
    *("model.num_layers=8", "model.hidden_size=48", "model.num_attention_heads=6", "model.ffn_hidden_size=64"),
    *("model.normalization=LayerNorm", "model.share_embeddings_and_output_weights=true", "num_steps=1"),
    *("model.make_vocab_size_divisible_by=64", "optimizer.lr=1e-2"),
)
"""A model that shares only the tokenizer and the longest context with the student; its vocabulary is padded further."""
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.normalization=RMSNorm")
EQUAL = ("loss/", "entropy/", "k/", "tokens/response", "teacher_", "student_nll")
SHARED = [{"math": 3, "code": 1}, "default", {"default": 1, "math": 1, "code": 2}]
FILES = {
    "taught": ["math", "code", None],
    "shared": SHARED,
    "reverse": [dict(reversed(one.items())) if isinstance(one, dict) else one for one in SHARED],
    "code": ["code"],
    "four": ["math", "code", "other", "llama"],
}
CODE, DEFAULT = "teachers.code={load: CODE, hint: none}", "teachers.default={template: 'H{solution}|{problem}'}"
NAMED = ("teachers.math={load: MATH, weight: 0.5}", CODE, DEFAULT)
WIDE_TEACHER = "teachers.math={load: WIDE, weight: 0.5}"
SHARED_FILE = "data.path=DATA/shared.jsonl"
PRODUCT = (SHARED_FILE, "teachers.math.weight=null", "teachers.code.weight=null", "teachers.join=product")
OWN_WEIGHTS = ("teachers.math.weight=0.5", "teachers.code.weight=3")
LOW_MEMORY = ("loss.fused=low_memory", "loss.fused_chunk_tokens=5", "schedule.teacher_store_gb=0")
KEPT_GRADIENT = ("loss.fused=keep_gradient", "loss.fused_chunk_tokens=7")
TWO_STEPS = ("num_steps=2", "checkpoint.save_every=1")


@pytest.fixture(scope="module")
def places(runs, own_data) -> dict[str, Path]:
    """Return the directory of the data, and of runs of one step from other random weights: the student and teachers."""
    for file, names in FILES.items():
        write_records_of_teachers(own_data, names, f"{file}.jsonl")
    seeds = {"student": 0, "math": 1, "code": 2, "wide": 3}
    options = {name: [FOUR_LAYERS, "num_steps=1", "optimizer.lr=1e-2", f"seed={seed}"] for name, seed in seeds.items()}
    options["wide"] += WIDE
    return {"data": own_data, **{name: runs(*options[name]) / "checkpoints" for name in seeds}}


@pytest.fixture(scope="module")
def of(places) -> Callable[..., list[str]]:
    """Return a function to the options of a run with named teachers; a word in capitals stands for a place."""

    def options(*more: str, teachers: Sequence[str] = NAMED, **given: Path) -> list[str]:
        found = {name.upper(): str(path) for name, path in (places | given).items()}
        start = [FOUR_LAYERS, "checkpoint.load=STUDENT", "data.path=DATA/taught.jsonl", "metrics.teacher_every=1"]
        words = [*start, *teachers, *more]
        return [re.sub("|".join(found), lambda place: found[place[0]], word) for word in words]

    return options


def loaded_model(trainer: Any, path: Path, model: Any = None) -> Any:
    """Return a model of one rank with the weights at ``path``; ``model``: its architecture, if not the student's."""
    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.model.build import new_chunks

    chunks = new_chunks(trainer.config, trainer.grid, trainer.run_data.vocab_size, model)
    load_weights(path, chunks, trainer.run_data.vocab_size)
    return chunks[0]


def step_and_definition(arguments: list[str], start: Path) -> tuple[set[str], float]:
    """Return the names of the teachers of a step, and the largest error of a gradient, relative to all gradients."""

    def use(trainer: Any) -> tuple[set[str], float]:
        from megatron_selfdistill.teachers.teacher_directories import teacher_architectures

        contexts, found = trained_gradients(trainer)
        vocab_size, target = trainer.run_data.vocab_size, trainer.learner.target
        named, others = trainer.config.named_teachers, teacher_architectures(trainer.config)
        student, reference = loaded_model(trainer, start), loaded_model(trainer, start)
        models = {
            name: reference if one.load is None else loaded_model(trainer, Path(one.load), others.get(name))
            for name, one in named.items()
        }
        assert all(models[name].config.hidden_size == 48 for name in others)
        own = {name: one.weight for name, one in named.items() if one.weight is not None}
        shares = {problem.id: dict(problem.shares or ()) for problem in trainer.run_data.problems.problems}
        expected = gradients_by_definition(contexts, student, reference, models, target, vocab_size, own, shares)
        if not joins(trainer.config.teachers):
            for context in contexts:
                assert (context.teacher_prompt == context.student_prompt) != named[context.teacher].is_hinted
                assert len(context.control_prompts) == target.num_controls
        assert expected.keys() == found.keys()
        norm = torch.stack([one.norm() for one in expected.values()]).norm()
        errors = [float((found[name] - expected[name]).norm() / norm) for name in expected]
        return {context.teacher for context in contexts}, max(errors)

    return with_trainer(arguments, use)


TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking %}=.;{% else %}|{% endif %}{% endif %}"
)
VIEWS = (
    *(f"data.chat_template='{TEMPLATE}'", "data.views.student={chat_template_kwargs: {enable_thinking: false}}"),
    "data.views.teacher={chat_template_kwargs: {enable_thinking: true}, system_prompt: '9,9'}",
)
CODE_HINTED = "teachers.code.hint=given"
QUICK_STEPS: dict[str, Sequence[str]] = {
    "another architecture": [WIDE_TEACHER],
    "product": [*PRODUCT, *OWN_WEIGHTS],
}
STEPS = QUICK_STEPS | {
    "several, with controls": [SHARED_FILE, CODE_HINTED, "target.control=other", "target.num_controls=2"],
    "a teacher per record, views of their own": [*VIEWS, CODE_HINTED],
    "a teacher per record": ["schedule.max_tokens=32"],  # a microbatch for each context
    # one response per step has the mean over its tokens in either normalisation; a weight of 1 changes nothing
    "several, by sequences": [SHARED_FILE, "loss.normalize=sequences", "data.global_batch_size=1"],
    "another architecture, low memory": [WIDE_TEACHER, *LOW_MEMORY],
    "another architecture, kept gradient": [WIDE_TEACHER, *KEPT_GRADIENT, "teacher.offload=cpu"],
    "another architecture, fixed k": [WIDE_TEACHER, "target.rule=fixed", "schedule.pair_order=teacher_first"],
    "product of two architectures": [WIDE_TEACHER, *PRODUCT],
    "product, mixed with the student": [*PRODUCT, "target.anchor=student"],
    "product, low memory": [*PRODUCT, *LOW_MEMORY],
    "product, kept gradient": [*PRODUCT, *KEPT_GRADIENT, "target.rule=fixed"],
    "product, the weight of the run": PRODUCT,
    "product, a weight of 0": [*PRODUCT, "teachers.math.weight=0", "teachers.code.weight=3", "loss.fused=low_memory"],
    "product, one weight": [*(*PRODUCT, "teachers.code.weight=2", "target.rule=fixed", "schedule.teacher_store_gb=0")],
}


@combinations(name=list(STEPS), quick={"name": QUICK_STEPS})
def test_a_step_has_the_gradient_of_the_definition(ranks, runs, places, of, tmp_path, name):
    """Each teacher with its weights, its prompt and its w; each response counts once, however many teachers it has."""
    of_step, start = runs.arguments(tmp_path / "run", *of(*STEPS[name])), places["student"]
    [(names, error)] = ranks.run(step_and_definition, of_step, start, world_size=1, init_process_group=False)
    wanted = {"code+math", "code+default+math"} if name.startswith("product") else {"math", "code", "default"}
    assert wanted <= names or name == "several, by sequences"
    assert error < 1e-5


@FULL
@pytest.mark.parametrize("options", [["teacher.offload=cpu"], ["target.anchor=student"], ["teachers.code.weight=2"]])
def test_a_teacher_guides_the_problems_that_it_teaches_with_its_own_weights(runs, of, options):
    """The log-probs of the sampler's teacher are those of the loss's; the weights of others come and go between."""
    guides = ["data.path=DATA/code.jsonl", "rollout.guidance=mixed", "teachers.guide=code", CODE_HINTED]
    assert_guided_by_the_teacher_of_the_loss(runs(*of("num_steps=2", *guides, *options)))


@FULL
def test_no_problem_of_another_teacher_is_guided(runs, of):
    run = runs(*of("num_steps=2", "rollout.guidance=mixed", "teachers.guide=default"))
    records = read_lines(run / "responses.jsonl")
    for step, line in enumerate(reproducible_metrics(run)):
        of_step = [record for record in records if record["step"] == step]
        guided = [record for record in of_step if record["teacher_log_probs"]]
        assert 0 < line["guided/share"] == len(guided) / len(of_step) < 1
        assert line["teacher_tokens/default"] == sum(len(record["log_probs"]) for record in guided)


def measured_and_trained(arguments: list[str]) -> list[tuple[str, float, float]]:
    def use(trainer: Any) -> list[tuple[str, float, float]]:
        found, step = [], []
        for batch in trainer.batches():
            measured = trainer.measure(batch)["loss/mean"]
            step.append(trainer.forward_backward(batch, trainer.pack(batch), step))
            found.append((batch.teacher, measured, float(step[-1].output.stats.loss.mean())))
        return found

    return with_trainer(arguments, use)


@FULL
def test_what_is_measured_of_a_product_is_what_a_step_trains_on(ranks, runs, of, tmp_path):
    of_step = runs.arguments(tmp_path / "run", *of(*PRODUCT))
    [found] = ranks.run(measured_and_trained, of_step, world_size=1, init_process_group=False)
    assert {"code+math", "code+default+math"} <= {name for name, *_ in found}
    assert all(measured == pytest.approx(trained, rel=1e-6) for _, measured, trained in found)


@FULL
def test_products_resume_and_do_not_depend_on_the_order_of_the_teachers(ranks, runs, of):
    whole = of(*TWO_STEPS, *PRODUCT)
    runs.resumed(*whole, step=1)
    others = of(*TWO_STEPS, *PRODUCT, "data.path=DATA/reverse.jsonl", "teacher.offload=cpu", teachers=NAMED[::-1])
    assert_equal_runs(ranks, runs(*whole), runs(*others), 2)


THREE_STEPS = ("num_steps=3", "checkpoint.save_every=2")


def test_the_loss_of_a_step_is_the_mean_of_its_teachers_losses_and_a_resumed_run_is_the_same(runs, of):
    one = runs(*of(*THREE_STEPS))
    for step in reproducible_metrics(one):
        names = [key.partition("/")[2] for key in step if key.startswith("teacher_loss/")]
        assert len(names) > 1 and names == sorted(names)
        tokens = {name: step[f"teacher_tokens/{name}"] for name in names}
        assert sum(tokens.values()) == step["tokens/response"]
        for of_one, of_all in (("loss", "loss/mean"), ("top1_agreement", "top1_agreement")):
            mean = sum(step[f"teacher_{of_one}/{name}"] * tokens[name] for name in names) / step["tokens/response"]
            assert mean == pytest.approx(step[of_all], rel=1e-9)
    halves = runs.resumed(*of(*THREE_STEPS), step=2)
    assert bytes_of(halves / "teacher") == bytes_of(one / "teacher") != {}, "the start, which is the reference"


@FULL
def test_a_directory_with_other_weights_than_before_is_refused_unless_forced(ranks, runs, places, of, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "math"
    shutil.copytree(places["math"], moved)
    train(ranks, runs.arguments(run, *of("num_steps=1", math=moved)))
    shutil.rmtree(moved)
    shutil.copytree(places["code"], moved)
    again = runs.arguments(run, *of("num_steps=2", math=moved))
    assert "teachers.math.load has changed" in refusal(ranks, again)
    train(ranks, [*again, "checkpoint.resume=force"])


@pytest.fixture(scope="module")
def adapted(runs, places, tmp_path_factory) -> dict[str, Path]:
    """Return adapters on the student as a checkpoint, and as a directory of PEFT."""
    fast = ["adapter.rank=3", "optimizer.lr=3e-1", "optimizer.lr_warmup_steps=0", "num_steps=2", "seed=7"]
    run, out = runs(FOUR_LAYERS, f"checkpoint.load={places['student']}", *fast), tmp_path_factory.mktemp("adapted")
    megatron_to_peft(run / "checkpoints", out / "peft", base_model="student")
    return {"adapters": run / "checkpoints", "peft": out / "peft"}


WITH_ADAPTERS = ("teachers.math={load: MATH, weight: 0.5}", "teachers.code.load=CODE", "teachers.default={}")


@FULL
@pytest.mark.parametrize("options", [["target.anchor=student"], ["adapter.rank=2", "teacher.offload=cpu"]], ids=str)
def test_adapters_of_both_formats_teach_with_the_same_bits_and_resume(runs, of, adapted, options):
    """The start below them is kept although no other model reads it."""
    whole, peft = (of(*options, *TWO_STEPS, teachers=WITH_ADAPTERS, math=path) for path in adapted.values())
    replay = f"tests.replay={runs(*whole)}/responses.jsonl"
    assert reproducible_metrics(runs(*peft, replay)) == reproducible_metrics(runs(*whole))
    runs.resumed(*whole, step=1)


@FULL
def test_such_a_teacher_is_refused_before_anything_is_built(ranks, runs, places, of, adapted, tmp_path):
    short = runs(*WIDE, "model.max_position_embeddings=64") / "checkpoints"
    cases = (
        ("is not the base of the adapters", "adapters", f"checkpoint.load={places['code']}"),
        ("teachers.math.load", "peft", "checkpoint.load=null"),  # nothing that could be its base
        ("and the longest context of this run has 128", "short", "num_steps=1"),
    )
    for named, math, option in cases:
        own = of(option, teachers=WITH_ADAPTERS, math=(adapted | {"short": short})[math])
        assert named in refusal(ranks, runs.arguments(tmp_path / "run", *own))
        assert not (tmp_path / "run" / "teacher").exists()


EP2 = ["parallel.expert_model_parallel_size=2"]
UNBALANCED = "model.transformer.moe_router_load_balancing_type=none"
HINTED, CODE_LOADED = "teachers.default.hint=given", "teachers.code.load=CODE"
IN_BOTH_FORMATS = ["teachers.math.load=ADAPTERS", "teachers.code.load=PEFT"]
OF_EXPERTS = "teachers.math={load: EXPERTS, weight: 0.5}"
ALIKE: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "a teacher per record": ({}, [*LAYOUTS.values()]),
    "shared records": ({"options": [SHARED_FILE]}, [LAYOUTS["DP2"], LAYOUTS["PP2"]]),
    "a product": ({"options": [*PRODUCT, *OWN_WEIGHTS]}, [*LAYOUTS.values(), FUSED_TP2]),
    "another architecture": ({"options": [WIDE_TEACHER]}, [*LAYOUTS.values()]),
    "adapters in both formats": (
        {"options": ["target.anchor=student"], "teachers": [*IN_BOTH_FORMATS, HINTED]},
        [LAYOUTS["TP2"], LAYOUTS["PP2xVPP2"]],
    ),
    "a mixture of experts": ({"options": [OF_EXPERTS]}, [EP2, FUSED_TP2, [*LAYOUTS["PP2"], *EP2]]),
    "a dense model of a mixture of experts": (
        {"options": ["checkpoint.load=MIXTURE", UNBALANCED], "teachers": [WIDE_TEACHER, CODE_LOADED, HINTED]},
        [EP2],
    ),
}
"""Kind of teachers -> what makes their options, and layouts."""


CASES = {f"{kind}, {layout}": (kind, layout) for kind, (_, layouts) in ALIKE.items() for layout in layouts}


@pytest.mark.full
@combinations(case=CASES)
def test_every_layout_has_the_steps_of_one_rank(request, runs, of, case):
    kind, layout = case
    made, given = ALIKE[kind][0], {}
    if "adapters" in kind:
        given = request.getfixturevalue("adapted")
    if "experts" in kind:
        given = {"experts": runs(*WIDE, *EXPERTS), "mixture": runs(FOUR_LAYERS, *EXPERTS, UNBALANCED, "num_steps=1")}
        given = {name: run / "checkpoints" for name, run in given.items()}
    options = of(*THREE_STEPS, *made.get("options", ()), teachers=made.get("teachers", NAMED), **given)
    world_size = 4 if len(layout) > 1 and EP2[0] in layout else 2
    assert_steps_equal(runs(*options), runs.replayed(*options, more=layout, world_size=world_size), EQUAL)


@FULL
def test_several_teachers_of_other_architectures_resume_and_their_order_and_place_change_no_bit(
    ranks, runs, of, tmp_path
):
    """Two of one architecture share a copy, and one has the student's; a directory of Hugging Face is the same bits."""
    other = runs(*WIDE, "seed=9") / "checkpoints"
    llama = runs(*WIDE, "model.normalization=RMSNorm", "seed=4") / "checkpoints"
    megatron_to_hf(llama, tmp_path / "hf")
    teachers = [WIDE_TEACHER, "teachers.code.load=CODE", "teachers.other={load: OTHER, hint: none}"]
    teachers.append("teachers.llama.load=LLAMA")
    options = [*TWO_STEPS, "data.path=DATA/four.jsonl"]
    whole = of(*options, teachers=teachers, other=other, llama=llama)
    runs.resumed(*whole, step=1)
    reverse = of(*options, "teacher.offload=cpu", teachers=teachers[::-1], other=other, llama=llama)
    assert_equal_runs(ranks, runs(*whole), runs(*reverse), 2)
    of_hf = of(*options, teachers=teachers, other=other, llama=tmp_path / "hf")
    assert reproducible_metrics(runs(*of_hf)) == reproducible_metrics(runs(*whole))


@FULL
@pytest.mark.parametrize("anchor", ["student", "reference"])
def test_in_bf16_and_beside_the_student_the_teachers_resume_bit_for_bit(runs, of, anchor):
    options = ["optimizer.precision=bf16", f"target.anchor={anchor}", *TWO_STEPS]
    halves = runs.resumed(*of(*options, teachers=[*NAMED[:2], "teachers.default.load=CODE"]), step=1)
    assert (halves / "teacher").exists() == (anchor == "reference"), "without a reference the start is not kept"
