# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with several teachers, whose weights are not those that the student starts from."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from taught import gradients_by_definition, gradients_of_products, trained_gradients, write_records_of_teachers
from tiers import combinations
from tiny_run import (
    TWO_RANKS,
    assert_equal_runs,
    assert_guided_by_the_teacher_of_the_loss,
    assert_resumes_equal,
    assert_steps_equal,
    bytes_of,
    overrides,
    refusal,
    reproducible_metrics,
    train,
    train_each,
    with_trainer,
)

from megatron_selfdistill.adapters.stored_adapters import require_adapters
from megatron_selfdistill.checkpoint.formats.model_tensors import weight_shapes
from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata
from megatron_selfdistill.interop.conversion import megatron_to_hf
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.interop.peft_adapters import megatron_to_peft
from megatron_selfdistill.interop.release import Progress, write_release
from megatron_selfdistill.interop.torch_dist_tensors import Piece, TorchDistReader
from megatron_selfdistill.teachers.teachers_config import joins

LAYOUTS = TWO_RANKS | {
    "DP2": ["schedule.max_tokens=64"],
    "PP2xVPP2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
}
FOUR_LAYERS = "model.num_layers=4"
WIDE = (
    *("model.num_layers=8", "model.hidden_size=48", "model.num_attention_heads=6", "model.ffn_hidden_size=64"),
    *("model.normalization=LayerNorm", "model.share_embeddings_and_output_weights=true"),
    *("model.make_vocab_size_divisible_by=64", "optimizer.lr=1e-2"),
)
"""A model that shares only the tokenizer and the longest context with the student; its vocabulary is padded further."""
EQUAL = ("loss/", "entropy/", "k/", "tokens/response", "teacher_", "student_nll")


FULL = pytest.mark.full


@pytest.fixture(scope="module")
def places(ranks, own_data, tmp_path_factory) -> dict[str, Path]:
    """Return the directory of the data, and of runs of one step from other random weights: the student and teachers."""
    write_records_of_teachers(own_data, ["math", "code", None])
    runs = tmp_path_factory.mktemp("runs")
    seeds = {"student": 0, "math": 1, "code": 2, "wide": 3}
    train_each(
        ranks,
        [
            overrides(
                *(own_data, runs / name, FOUR_LAYERS, f"seed={seed}", "num_steps=1", "optimizer.lr=1e-2"),
                *(WIDE if name == "wide" else ()),
            )
            for name, seed in seeds.items()
        ],
    )
    return {"data": own_data, **{name: runs / name / "checkpoints" for name in seeds}}


def arguments(places: dict[str, Path], run_dir: Path, *options: str, teachers: Sequence[str] = ()) -> list[str]:
    """Return the arguments of a run from the student's weights with three teachers; ``teachers`` replaces theirs."""
    named = teachers or (
        f"teachers.math={{load: {places['math']}, weight: 0.5}}",
        f"teachers.code={{load: {places['code']}, hint: none}}",
        "teachers.default={template: 'H{solution}|{problem}'}",
    )
    start = [f"checkpoint.load={places['student']}", f"data.path={places['data']}/taught.jsonl"]
    return overrides(places["data"], run_dir, FOUR_LAYERS, *start, "metrics.teacher_every=1", *named, *options)


def loaded_model(trainer: Any, path: Path, model: Any = None) -> Any:
    """Return a model of one rank with the weights at ``path``; ``model``: its architecture, if not the student's."""
    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.model.build import new_chunks

    chunks = new_chunks(trainer.config, trainer.grid, trainer.run_data.vocab_size, model)
    load_weights(path, chunks, trainer.run_data.vocab_size)
    return chunks[0]


def step_and_definition(arguments: list[str], places: dict[str, Path]) -> tuple[set[str], float]:
    """Return the names of the teachers and products of a step, and the largest error of its gradients.

    The error is relative to the norm of the gradients.
    """

    def use(trainer: Any) -> tuple[set[str], float]:
        from megatron_selfdistill.teachers.teacher_directories import teacher_architectures

        contexts, found = trained_gradients(trainer)
        vocab_size, target = trainer.run_data.vocab_size, trainer.learner.target
        named, others = trainer.config.named_teachers, teacher_architectures(trainer.config)
        student, reference = loaded_model(trainer, places["student"]), loaded_model(trainer, places["student"])
        models = {
            name: reference if one.load is None else loaded_model(trainer, Path(one.load), others.get(name))
            for name, one in named.items()
        }
        assert all(models[name].config.hidden_size == 48 for name in others)
        own = {name: one.weight for name, one in named.items() if one.weight is not None}
        if joins(trainer.config.teachers):
            expected = gradients_of_products(contexts, student, reference, models, target, vocab_size, own)
        else:
            weights = {name: own.get(name, target.teacher_weight) for name in named}
            teachers = {
                name: (model, dataclasses.replace(target, teacher_weight=weights[name]))
                for name, model in models.items()
            }
            problems = trainer.run_data.problems.problems
            shares = {problem.id: dict(problem.shares) for problem in problems if problem.shares}
            expected = gradients_by_definition(contexts, student, reference, teachers, vocab_size, shares)
            for context in contexts:
                assert (context.teacher_prompt == context.student_prompt) != named[context.teacher].is_hinted
                assert len(context.control_prompts) == target.num_controls
        assert expected.keys() == found.keys()
        norm = torch.stack([one.norm() for one in expected.values()]).norm()
        errors = [float((found[name] - expected[name]).norm() / norm) for name in expected]
        return {context.teacher for context in contexts}, max(errors)

    return with_trainer(arguments, use)


SHARED = [{"math": 3, "code": 1}, "default", {"default": 1, "math": 1, "code": 2}]
SHARED_FILE = "data.path=DATA/shared.jsonl"
OWN_WEIGHTS = ["teachers.math.weight=0.5", "teachers.code.weight=3"]
PRODUCT = [f"teachers.{name}.weight=null" for name in ("math", "code")] + ["teachers.join=product"]
WIDE_TEACHER = "teachers.math={load: WIDE_TEACHER, weight: 0.5}"
LOW_MEMORY = ["loss.fused=low_memory", "loss.fused_chunk_tokens=5", "schedule.teacher_store_gb=0"]
KEPT_GRADIENT = ["loss.fused=keep_gradient", "loss.fused_chunk_tokens=7"]
QUICK_STEPS: dict[str, list[str]] = {
    "a teacher per record": ["schedule.max_tokens=32"],  # a microbatch for each context
    "another architecture": [WIDE_TEACHER],
    "product": [SHARED_FILE, *PRODUCT, *OWN_WEIGHTS],
    "several, with controls": [
        *(SHARED_FILE, "teachers.code.hint=given", "target.control=other", "target.num_controls=2"),
    ],
}
STEPS = QUICK_STEPS | {
    # one response per step has the mean over its tokens in either normalisation; a weight of 1 changes nothing
    "several, by sequences": [
        *(SHARED_FILE, "loss.normalize=sequences", "loss.rollout_correction=truncated", "data.global_batch_size=1"),
    ],
    "another architecture, low memory": [WIDE_TEACHER, *LOW_MEMORY],
    "another architecture, kept gradient": [WIDE_TEACHER, *KEPT_GRADIENT, "teacher.offload=cpu"],
    "another architecture, fixed k": [WIDE_TEACHER, "target.rule=fixed", "schedule.pair_order=teacher_first"],
    "product of two architectures": [WIDE_TEACHER, SHARED_FILE, *PRODUCT],
    "product, mixed with the student": [SHARED_FILE, *PRODUCT, "target.anchor=student"],
    "product, low memory": [SHARED_FILE, *PRODUCT, *LOW_MEMORY],
    "product, kept gradient": [SHARED_FILE, *PRODUCT, *KEPT_GRADIENT, "target.rule=fixed"],
    "product, the weight of the run": [SHARED_FILE, *PRODUCT],
    "product, a weight of 0": [
        *(SHARED_FILE, *PRODUCT, "teachers.math.weight=0", "teachers.code.weight=3", "loss.fused=low_memory"),
    ],
    "product, one weight": [
        *(SHARED_FILE, *PRODUCT, "teachers.code.weight=2", "target.rule=fixed", "schedule.teacher_store_gb=0"),
    ],
}


@pytest.mark.parametrize("name", [*QUICK_STEPS, *(pytest.param(n, marks=FULL) for n in STEPS if n not in QUICK_STEPS)])
def test_a_step_has_the_gradient_of_the_definition(ranks, places, tmp_path, name):
    """Each teacher with its weights, its prompt and its w; each response counts once, however many teachers it has.

    A teacher of another architecture differs in layers, width, heads, norms, ties and the padding of its vocabulary.
    """
    write_records_of_teachers(places["data"], SHARED, "shared.jsonl")
    own = {"WIDE_TEACHER": str(places["wide"]), "DATA": str(places["data"])}
    options = [re.sub("|".join(own), lambda found: own[found[0]], option) for option in STEPS[name]]
    of_step = arguments(places, tmp_path / "run", *options)
    [(names, error)] = ranks.run(step_and_definition, of_step, places, world_size=1, init_process_group=False)
    wanted = {"code+math", "code+default+math"} if name.startswith("product") else {"math", "code", "default"}
    assert wanted <= names or name == "several, by sequences"
    assert error < 1e-5


def of_wide(places: dict[str, Path], run_dir: Path, *options: str) -> list[str]:
    """Return the arguments of a run with a wide teacher, one of the student's architecture and the start."""
    return arguments(places, run_dir, WIDE_TEACHER.replace("WIDE_TEACHER", str(places["wide"])), *options)


FUSED_TP2 = [*LAYOUTS["TP2"], "parallel.sequence_parallel=true", "loss.fused=low_memory"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("shared", LAYOUTS[name]) for name in ("DP2", "PP2")),
        *(("product", layout) for layout in (*LAYOUTS.values(), FUSED_TP2)),
        *(("another architecture", layout) for layout in LAYOUTS.values()),
    ],
    ids=str,
)
def test_several_teachers_have_the_steps_of_one_rank_in_every_layout(ranks, places, tmp_path, kind, layout):
    """A record has several teachers, or their product, or a teacher of another architecture."""
    shared = f"data.path={write_records_of_teachers(places['data'], SHARED, 'shared.jsonl')}"
    more = {"shared": [shared], "product": [shared, *PRODUCT, *OWN_WEIGHTS], "another architecture": []}[kind]
    options, record = ["num_steps=2", "checkpoint.save_every=0", *more], f"{tmp_path}/responses.jsonl"
    of = of_wide if kind == "another architecture" else arguments
    train(ranks, of(places, tmp_path / "one", *options, f"tests.record={record}"))
    train(ranks, of(places, tmp_path / "two", *options, f"tests.replay={record}", *layout), 2)
    assert_steps_equal(tmp_path / "one", tmp_path / "two", EQUAL)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        ["teacher.offload=cpu"],
        ["target.anchor=student"],
        ["teachers.code.weight=2", "schedule.pair_order=teacher_first"],
    ],
    ids=str,
)
def test_a_teacher_guides_the_problems_that_it_teaches_with_its_own_weights(ranks, places, tmp_path, options):
    """The log-probs of the sampler's teacher are those of the loss's; the weights of others come and go between."""
    recorded, file = tmp_path / "recorded.jsonl", write_records_of_teachers(places["data"], ["code"], "code.jsonl")
    guides = ["rollout.guidance=mixed", "teachers.guide=code", "teachers.code.hint=given", f"tests.record={recorded}"]
    train(ranks, arguments(places, tmp_path / "run", "num_steps=2", f"data.path={file}", *guides, *options))
    assert_guided_by_the_teacher_of_the_loss(tmp_path / "run", recorded)


@pytest.mark.full
def test_no_problem_of_another_teacher_is_guided(ranks, places, tmp_path):
    recorded = tmp_path / "recorded.jsonl"
    guides = ["rollout.guidance=mixed", "teachers.guide=default", f"tests.record={recorded}"]
    train(ranks, arguments(places, tmp_path / "run", "num_steps=2", *guides))
    records = [json.loads(line) for line in recorded.read_text().splitlines()]
    for step, line in enumerate(reproducible_metrics(tmp_path / "run")):
        of_step = [record for record in records if record["step"] == step]
        guided = [record for record in of_step if record["teacher_log_probs"]]
        assert 0 < line["guided/share"] == len(guided) / len(of_step) < 1
        assert line["teacher_tokens/default"] == sum(len(record["log_probs"]) for record in guided)


def measured_and_trained(arguments: list[str]) -> list[tuple[str, float, float]]:
    """Return the teacher of each batch of a step, and its mean loss when it is measured and when it is trained on."""

    def use(trainer: Any) -> list[tuple[str, float, float]]:
        found, step = [], []
        for batch in trainer.batches():
            measured = trainer.measure(batch)["loss/mean"]
            step.append(trainer.forward_backward(batch, trainer.pack(batch), step))
            found.append((batch.teacher, measured, float(step[-1].output.stats.loss.mean())))
        return found

    return with_trainer(arguments, use)


@pytest.mark.full
def test_what_is_measured_of_a_product_is_what_a_step_trains_on(ranks, places, tmp_path):
    file = write_records_of_teachers(places["data"], SHARED, "shared.jsonl")
    of_step = arguments(places, tmp_path / "run", f"data.path={file}", *PRODUCT)
    [found] = ranks.run(measured_and_trained, of_step, world_size=1, init_process_group=False)
    assert {"code+math", "code+default+math"} <= {name for name, *_ in found}
    assert all(measured == pytest.approx(trained, rel=1e-6) for _, measured, trained in found)


@pytest.mark.full
def test_products_resume_and_do_not_depend_on_the_order_of_the_teachers(ranks, places, tmp_path):
    reverse = [dict(reversed(one.items())) if isinstance(one, dict) else one for one in SHARED]
    files = [write_records_of_teachers(places["data"], it, f"{i}.jsonl") for i, it in enumerate((SHARED, reverse))]
    options = ["num_steps=2", "checkpoint.save_every=1", *PRODUCT]

    def of(run_dir: Path) -> list[str]:
        return arguments(places, run_dir, *options, f"data.path={files[0]}")

    train(ranks, of(tmp_path / "whole"))
    assert_resumes_equal(ranks, tmp_path / "whole", of, step=1, num_steps=2)
    named = arguments(places, tmp_path / "other", *options, f"data.path={files[1]}")
    others = [option for option in named if not option.startswith("teachers.") or option in PRODUCT]
    teachers = [option for option in named if option.startswith("teachers.") and option not in PRODUCT]
    position = others.index(PRODUCT[0])
    train(ranks, [*others[:position], *reversed(teachers), *others[position:], "teacher.offload=cpu"])
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "other", 2)


@pytest.fixture(scope="module")
def one(ranks, places, tmp_path_factory) -> Path:
    """Return the directory of a run of one rank and three steps, with its responses in responses.jsonl."""
    run = tmp_path_factory.mktemp("one") / "run"
    options = ["num_steps=3", "checkpoint.save_every=2", f"tests.record={run}/responses.jsonl"]
    train(ranks, arguments(places, run, *options))
    return run


def test_the_loss_of_a_step_is_the_mean_of_its_teachers_losses(one):
    for step in reproducible_metrics(one):
        names = [key.partition("/")[2] for key in step if key.startswith("teacher_loss/")]
        assert len(names) > 1 and names == sorted(names)
        tokens = {name: step[f"teacher_tokens/{name}"] for name in names}
        assert sum(tokens.values()) == step["tokens/response"]
        for of_one, of_all in (("loss", "loss/mean"), ("top1_agreement", "top1_agreement")):
            mean = sum(step[f"teacher_{of_one}/{name}"] * tokens[name] for name in names) / step["tokens/response"]
            assert mean == pytest.approx(step[of_all], rel=1e-9)


@combinations(name=list(LAYOUTS), quick={"name": ["DP2"]}, strength=1)
def test_every_layout_has_the_steps_of_one_rank(ranks, places, one, tmp_path, name):
    replay = f"tests.replay={one}/responses.jsonl"
    options = ["num_steps=3", "checkpoint.save_every=0", replay, *LAYOUTS[name]]
    train(ranks, arguments(places, tmp_path / "run", *options), 2)
    assert_steps_equal(one, tmp_path / "run", EQUAL)


def test_a_resumed_run_equals_one_that_never_stopped(ranks, places, one):
    def of(run_dir: Path) -> list[str]:
        return arguments(places, run_dir, "num_steps=3", "checkpoint.save_every=2")

    halves = assert_resumes_equal(ranks, one, of, step=2, num_steps=3)
    assert bytes_of(halves / "teacher") == bytes_of(one / "teacher") != {}, "the start, which is the reference"


@pytest.mark.full
def test_a_directory_with_other_weights_than_before_is_refused_unless_forced(ranks, places, one, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "math"
    shutil.copytree(places["math"], moved)
    own = {**places, "math": moved}
    train(ranks, arguments(own, run, "num_steps=1"))
    shutil.rmtree(moved)
    shutil.copytree(places["code"], moved)
    message = refusal(ranks, arguments(own, run, "num_steps=2"))
    assert "the directory of teachers.math.load has changed since" in message
    train(ranks, arguments(own, run, "num_steps=2", "checkpoint.resume=force"))


def merge(adapters: Path, out: Path) -> None:
    """Write the weights below ``adapters`` with the products of the factors added as the checkpoint ``out``."""
    stored = require_adapters(adapters)
    base = open_weights(stored.base_place())
    factors = TorchDistReader(adapters)
    pieces = []
    for key, shape in weight_shapes(base.source.shapes).items():
        weight, adapter = base.source.read_at((key, ()), ()), f"{key.removesuffix('.weight')}_adapter"
        if f"{adapter}.a" in factors.shapes:
            a, b = (factors.read_at((f"{adapter}.{name}", ()), ()) for name in "ab")
            weight = weight + (stored.settings.scale * b.double() @ a.double()).to(weight.dtype)
        pieces.append(Piece(key, shape, (0,) * len(shape), shape, weight.dtype, lambda made=weight: made))
    objects = [key for key in load_metadata(base.path).state_dict_metadata if "_extra_state" in key]
    write_release(out, pieces, base.args, empty_objects=objects, progress=Progress())


@pytest.fixture(scope="module")
def adapted(ranks, places, tmp_path_factory) -> dict[str, Path]:
    """Return adapters on the student as a checkpoint, as a directory of PEFT, and merged into full weights."""
    run = tmp_path_factory.mktemp("adapted")
    start = f"checkpoint.load={places['student']}"
    fast = ["adapter.rank=3", "optimizer.lr=3e-1", "optimizer.lr_warmup_steps=0", "num_steps=2", "seed=7"]
    train(ranks, overrides(places["data"], run, FOUR_LAYERS, start, *fast))
    found = {"adapters": run / "checkpoints", "peft": run / "peft", "merged": run / "merged"}
    merge(found["adapters"] / "iter_0000002", found["merged"])
    megatron_to_peft(found["adapters"], found["peft"], base_model="student")
    return found


def of_adapters(places: dict[str, Path], run_dir: Path, math: Path, *options: str) -> list[str]:
    """Return the arguments of a run with a full teacher, one at ``math``, and the start."""
    named = [f"teachers.math={{load: {math}, weight: 0.5}}", f"teachers.code.load={places['code']}"]
    return arguments(places, run_dir, "checkpoint.save_every=1", *options, teachers=[*named, "teachers.default={}"])


@pytest.mark.full
@pytest.mark.parametrize("options", [["target.anchor=student"], ["adapter.rank=2", "teacher.offload=cpu"]], ids=str)
def test_adapters_teach_what_their_merged_weights_teach_and_resume(ranks, places, adapted, tmp_path, options):
    """Both formats are the same bits; the start below them is kept although no other model reads it."""
    record = f"{tmp_path}/responses.jsonl"
    options = [*options, "num_steps=2"]

    def of(run_dir: Path) -> list[str]:
        return of_adapters(places, run_dir, adapted["adapters"], *options)

    train(ranks, [*of(tmp_path / "whole"), f"tests.record={record}"])
    replay = f"tests.replay={record}"
    train(ranks, of_adapters(places, tmp_path / "merged", adapted["merged"], *options, replay))
    assert_steps_equal(tmp_path / "merged", tmp_path / "whole", EQUAL)
    train(ranks, of_adapters(places, tmp_path / "peft", adapted["peft"], *options, replay))
    assert reproducible_metrics(tmp_path / "peft") == reproducible_metrics(tmp_path / "whole")
    assert_resumes_equal(ranks, tmp_path / "whole", of, step=1, num_steps=2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["TP2", "PP2xVPP2"])
def test_adapters_teach_alike_in_every_layout(ranks, places, adapted, tmp_path, name):
    record, only = f"{tmp_path}/responses.jsonl", ["num_steps=2", "target.anchor=student"]
    teachers = [f"teachers.math.load={adapted['adapters']}", f"teachers.code.load={adapted['peft']}"]
    options = {"teachers": [*teachers, "teachers.default.hint=given"]}
    train(ranks, arguments(places, tmp_path / "one", *only, f"tests.record={record}", **options))
    train(ranks, arguments(places, tmp_path / "two", *only, f"tests.replay={record}", *LAYOUTS[name], **options), 2)
    assert_steps_equal(tmp_path / "one", tmp_path / "two", EQUAL)


@pytest.mark.full
def test_adapters_of_other_weights_or_without_a_base_are_refused_before_anything_is_built(
    ranks, places, adapted, tmp_path
):
    other = of_adapters(places, tmp_path / "run", adapted["adapters"], f"checkpoint.load={places['code']}")
    assert "is not the base of the adapters in" in refusal(ranks, other)
    assert "set checkpoint.load to the present place" in refusal(ranks, other)
    from_nothing = of_adapters(places, tmp_path / "run", adapted["peft"], "checkpoint.load=null")
    assert "teachers.math.load" in (message := refusal(ranks, from_nothing)) and "set checkpoint.load to" in message
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.full
def test_another_architecture_with_fewer_positions_than_the_longest_context_is_refused(ranks, places, tmp_path):
    short = overrides(places["data"], tmp_path / "short", *WIDE, "model.max_position_embeddings=64", "num_steps=1")
    train(ranks, short)
    named = f"teachers.math.load={tmp_path}/short/checkpoints"
    message = refusal(ranks, arguments(places, tmp_path / "run", named))
    assert "takes contexts of 64 tokens at most, and the longest context of this run has 128: set data.max" in message


MOE = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.normalization=RMSNorm")


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "world"),
    [
        (["parallel.expert_model_parallel_size=2"], 2),
        (["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "loss.fused=low_memory"], 2),
        (["parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2"], 4),
    ],
    ids=str,
)
def test_a_mixture_of_experts_teaches_a_dense_student_alike_in_every_layout(ranks, places, tmp_path, layout, world):
    train(ranks, overrides(places["data"], tmp_path / "moe", *WIDE, *MOE, "num_steps=1"))
    own, options = {**places, "wide": tmp_path / "moe" / "checkpoints"}, ["num_steps=2", "checkpoint.save_every=0"]
    record = f"{tmp_path}/responses.jsonl"
    train(ranks, of_wide(own, tmp_path / "one", *options, f"tests.record={record}"))
    train(ranks, of_wide(own, tmp_path / "two", *options, f"tests.replay={record}", *layout), world)
    assert_steps_equal(tmp_path / "one", tmp_path / "two", EQUAL)


@pytest.mark.full
def test_a_dense_model_teaches_a_mixture_of_experts_alike_in_both_layouts(ranks, places, tmp_path):
    experts = [*MOE, "model.transformer.moe_router_load_balancing_type=none"]
    train(ranks, overrides(places["data"], tmp_path / "moe", FOUR_LAYERS, *experts, "num_steps=1"))
    own, record = {**places, "student": tmp_path / "moe" / "checkpoints"}, f"{tmp_path}/responses.jsonl"

    def of(run_dir: Path, *options: str) -> list[str]:
        named = f"teachers.math={{load: {places['wide']}, weight: 0.5}}", f"teachers.code.load={places['code']}"
        options = (
            "num_steps=2",
            "checkpoint.save_every=0",
            "model.transformer.moe_router_load_balancing_type=none",
            *options,
        )
        return arguments(own, run_dir, *options, teachers=[*named, "teachers.default.hint=given"])

    train(ranks, of(tmp_path / "one", f"tests.record={record}"))
    train(ranks, of(tmp_path / "two", f"tests.replay={record}", "parallel.expert_model_parallel_size=2"), 2)
    assert_steps_equal(tmp_path / "one", tmp_path / "two", EQUAL)


@pytest.mark.full
def test_several_teachers_of_other_architectures_resume_and_their_order_and_place_change_no_bit(
    ranks, places, tmp_path
):
    """Two of one architecture share a copy, and one has the student's; a directory of Hugging Face is the same bits."""
    train(ranks, overrides(places["data"], tmp_path / "other", *WIDE, "num_steps=1", "seed=9"))
    other = tmp_path / "other" / "checkpoints"
    wide = [*WIDE, "model.normalization=RMSNorm", "seed=4", "num_steps=1"]
    train(ranks, overrides(places["data"], tmp_path / "llama", *wide))
    megatron_to_hf(tmp_path / "llama" / "checkpoints", tmp_path / "hf")
    file = write_records_of_teachers(places["data"], ["math", "code", "other", "llama"], "four.jsonl")
    options = ["num_steps=2", "checkpoint.save_every=1", f"data.path={file}"]

    def of(run_dir: Path, llama: Path = tmp_path / "llama" / "checkpoints", reverse: bool = False) -> list[str]:
        named = [
            f"teachers.math={{load: {places['wide']}, weight: 0.5}}",
            f"teachers.code.load={places['code']}",
            f"teachers.other={{load: {other}, hint: none}}",
            f"teachers.llama.load={llama}",
        ]
        return arguments(places, run_dir, *options, teachers=named[::-1] if reverse else named)

    train(ranks, of(tmp_path / "whole"))
    assert_resumes_equal(ranks, tmp_path / "whole", of, step=1, num_steps=2)
    train(ranks, [*of(tmp_path / "reverse", reverse=True), "teacher.offload=cpu"])
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "reverse", 2)
    train(ranks, of(tmp_path / "of_hf", llama=tmp_path / "hf"))
    assert reproducible_metrics(tmp_path / "of_hf") == reproducible_metrics(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("anchor", ["student", "reference"])
def test_in_bf16_and_beside_the_student_the_teachers_resume_bit_for_bit(ranks, places, tmp_path, anchor):
    options = ["optimizer.precision=bf16", f"target.anchor={anchor}", "num_steps=2", "checkpoint.save_every=1"]
    start = [option for option in arguments(places, tmp_path, *options) if not option.startswith("teachers.default")]

    def of(run_dir: Path) -> list[str]:
        return [*start, f"run_dir={run_dir}", f"teachers.default.load={places['code']}"]

    train(ranks, of(tmp_path / "whole"))
    halves = assert_resumes_equal(ranks, tmp_path / "whole", of, step=1, num_steps=2)
    assert (halves / "teacher").exists() == (anchor == "reference"), "without a reference the start is not kept"
