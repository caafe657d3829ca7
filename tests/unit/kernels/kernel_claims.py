# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims that the loss's Triton kernels compute what their twins and float64 compute.

With TRITON_INTERPRET=1, which must be set before triton is imported, the kernels run on CPU tensors in Triton's
interpreter; without it they run on the GPU, which conftest.py shows with SELFDISTILL_TEST_GPU=1 only.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import plateaus
import pytest
import torch
from kernel_cases import DEVICE, after, assert_same, cases, cut_rows, full, logits, reference, run
from logit_pairs import DIVERGENCES, TARGETS
from torch import Tensor

from megatron_selfdistill.kernels import pass_launches, solver_launches
from megatron_selfdistill.loss import (
    Divergence,
    Status,
    Target,
    TokenStats,
    VocabShard,
    distillation_loss,
    solve_target,
)
from megatron_selfdistill.loss.sharded import shard_sums, token_statistics
from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid, Shard
from megatron_selfdistill.loss.sharded.token_statistics import BetaSolution, MergedSums
from megatron_selfdistill.loss.sharded.vocab_parallel import vocab_entropy

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Return the number of parts of a row in this test: 1, unless the test asks for more."""
    return cut_rows(monkeypatch, getattr(request, "param", 1))


@cases(
    "rule, kind",
    [
        *list(zip(TARGETS, itertools.cycle(DIVERGENCES), strict=False))[1:],
        *(("capped", "reverse"), ("capped", "forward"), ("strict", "jsd")),
    ],
    TARGETS,
    DIVERGENCES,
    quick=1,
)
def test_loss_and_gradient_equal_float64_and_every_statistic_pytorchs(rule: str, kind: str) -> None:
    student, teacher, tokens = logits(8, 333)
    vocab = VocabShard(0, 333, 300)  # the rest is padding
    arguments = student, teacher, tokens, TARGETS[rule], DIVERGENCES[kind]
    (stats, ours), (theirs, _) = (run(*arguments, vocab=vocab, backend=name) for name in ("triton", "torch"))
    loss, gradient = reference(student[:, :300], teacher[:, :300], TARGETS[rule], DIVERGENCES[kind])
    torch.testing.assert_close(stats.loss.double(), loss, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(ours[:, :300].double(), gradient, rtol=1e-4, atol=3e-6)
    assert (ours[:, 300:] == 0).all()
    assert_same(stats, theirs)


@cases("rule", ["teacher alone", "strict"], ["teacher alone", "strict", "fixed"], quick=1)
def test_forward_kl_is_added_where_the_target_is_uncertain_as_in_float64(rule: str) -> None:
    student, teacher, tokens = logits(8, 333, seed=4)
    vocab, target = VocabShard(0, 333, 300), TARGETS[rule]
    entropies = (
        run(student, teacher, tokens, target, DIVERGENCES["reverse"], vocab=vocab)[0].target_entropy.sort().values
    )
    widest = int(entropies.diff()[1:-1].argmax()) + 1
    kind = Divergence(forward_above=entropies[widest : widest + 2].mean().item())
    arguments = student, teacher, tokens, target, kind
    (stats, ours), (theirs, _) = (run(*arguments, vocab=vocab, backend=name) for name in ("triton", "torch"))
    gated = stats.target_entropy > kind.forward_above
    assert 2 <= gated.sum() <= 6
    valid = student[:, :300], teacher[:, :300], target
    (reverse, of_reverse), (forward, of_forward) = (reference(*valid, DIVERGENCES[k]) for k in ("reverse", "forward"))
    torch.testing.assert_close(stats.loss.double(), reverse + gated * forward, rtol=1e-5, atol=1e-5)
    wanted = of_reverse + gated[:, None] * of_forward
    torch.testing.assert_close(ours[:, :300].double(), wanted, rtol=1e-4, atol=6e-6)
    assert (ours[:, 300:] == 0).all()
    assert_same(stats, theirs)


RENYI = list(itertools.product(("reverse_kl", "forward_kl"), (0.5, 0.95, 4.0)))


@cases(
    "direction, order, parts", [(*kind, 2) for kind in RENYI], ("reverse_kl", "forward_kl"), (0.5, 4.0), [2], quick=1
)
def test_renyi_divergences_and_their_gradients_equal_float64(direction: str, order: float, parts: int) -> None:
    student, teacher, tokens = logits(8, 333, seed=6)
    student[3, 250:260] = teacher[3, 250:260] = -torch.inf
    vocab, kind, target = VocabShard(0, 333, 300), Divergence(direction, order=order), TARGETS["teacher alone"]
    arguments = student, teacher, tokens, target, kind
    (stats, ours), (theirs, twin) = (run(*arguments, vocab=vocab, backend=name) for name in ("triton", "torch"))
    s = student[:, :300].double().requires_grad_()
    log_p, log_q = (x.log_softmax(-1).clamp(min=-1e5) for x in (s, teacher[:, :300].double()))
    first, other = (log_p, log_q) if direction == "reverse_kl" else (log_q, log_p)
    loss = (order * first + (1 - order) * other).logsumexp(-1) / (order - 1)
    torch.testing.assert_close(stats.loss.double(), loss.detach(), rtol=2e-5, atol=2e-5)
    (gradient,) = torch.autograd.grad((loss * torch.linspace(-1, 2, 8, device=DEVICE).double()).sum(), s)
    torch.testing.assert_close(ours[:, :300].double(), gradient, rtol=1e-3, atol=5e-5)
    torch.testing.assert_close(ours, twin, rtol=1e-3, atol=2e-5)
    assert (ours[:, 300:] == 0).all() and (ours[3, 250:260] == 0).all()
    assert_same(stats, theirs, 2e-5)


SHAPES = [  # columns, columns that are no padding, dtypes
    (128, 128, torch.float32, torch.float32),
    (300, 255, torch.float32, torch.float32),
    (1, 1, torch.float32, torch.float32),
    (528, 500, torch.bfloat16, torch.float32),
    (130, 129, torch.float32, torch.float32),
    (127, 127, torch.float32, torch.float32),
    (700, 0, torch.float32, torch.float32),
    (700, 512, torch.bfloat16, torch.bfloat16),
    (1111, 1100, torch.bfloat16, torch.bfloat16),
    (257, 257, torch.float16, torch.float16),
    (520, 500, torch.bfloat16, torch.float32),
    (520, 500, torch.float32, torch.bfloat16),
    (1104, 1100, torch.bfloat16, torch.bfloat16),
    (1040, 1030, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("size", "num_valid", "student_dtype", "teacher_dtype"), after(2, SHAPES))
def test_the_first_pass_of_any_shape_equals_float64(
    size: int, num_valid: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    student, teacher, tokens = logits(8, size)
    student, teacher = student.to(student_dtype)[:, :num_valid], teacher.to(teacher_dtype)[:, :num_valid]
    assert_first_pass(
        Shard(student, teacher, Target(anchor="student").mix_weights, torch.float32), tokens, Target(anchor="student")
    )


@cases(
    "rule, num_parts",
    [("strict", 3), ("strict", 1), ("strict", 8), ("fixed", 3), ("teacher alone", 3), ("no teacher", 3)],
    ["strict", "fixed", "teacher alone", "no teacher"],
    [1, 3, 8],
    quick=1,
)
def test_the_first_pass_in_parts_equals_float64(rule: str, num_parts: int) -> None:
    student, teacher, tokens = logits(8, 900, seed=2)
    shard = Shard(student, teacher, TARGETS[rule].mix_weights, torch.float32, num_parts)
    assert_first_pass(shard, tokens, TARGETS[rule])


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_read_16_bytes_at_a_time_give_the_sums_of_columns_read_one_by_one(dtype: torch.dtype) -> None:
    """The compiler contracts the products and sums of the two kernels differently, so that their roundings differ."""
    student, teacher, tokens = logits(7, 1300, seed=10)
    student, teacher = student.to(dtype), teacher.to(dtype)
    shifted = [torch.empty(7, 1328, device=DEVICE, dtype=dtype)[:, 1:1301].copy_(x) for x in (student, teacher)]
    aligned = [torch.empty(7, 1328, device=DEVICE, dtype=dtype)[:, :1300].copy_(x) for x in (student, teacher)]
    found = []
    for packed, rows in ((True, aligned), (False, shifted)):
        shard = Shard(*rows, Target(anchor="student").mix_weights, torch.float32, 2)
        assert pass_launches.is_packed(shard) == packed
        sums, argmax = pass_launches.first_pass(shard, BetaGrid.of(Target(anchor="student"), torch.float32), tokens, 0)
        solver_state = solver_launches.solve_tokens(sums, BetaGrid.of(Target(anchor="student"), torch.float32))
        second = pass_launches.second_pass(shard, solver_state.constants, argmax, forward_kl=True)
        found.append((sums, argmax, second, pass_launches.jsd_pass(shard, solver_state.constants, 0.3)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_first_pass(shard: Shard, tokens: Tensor, target: Target, start: int = 50) -> None:
    grid = BetaGrid.of(target, torch.float32)
    ours, argmax = pass_launches.first_pass(shard, grid, tokens + start, start)
    wide = Shard(shard.student.double(), shard.teacher.double(), shard.mix_weights, torch.float64)
    exact, _ = shard_sums.first_pass(wide, replace(grid, dtype=torch.float64), tokens + start, start)
    assert ours.shape == (shard.num_parts, *exact.shape[1:]) and argmax.shape == ours.shape[:2]
    if shard.student.shape[1] == 0:
        assert torch.equal(ours[0], exact[0].float())
        return
    ours, exact = MergedSums.merge(ours.double(), grid), MergedSums.merge(exact, grid)
    for side in ("student", "teacher"):
        a, b = getattr(ours, side), getattr(exact, side)
        assert torch.equal(a.maximum, b.maximum) and torch.equal(a.argmax, b.argmax)
        torch.testing.assert_close(a.log_sum, b.log_sum, rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(a.entropy, b.entropy, rtol=3e-6, atol=1e-12)
    kept = torch.arange(8, device=DEVICE) != 6
    torch.testing.assert_close(ours.mix_max[kept], exact.mix_max[kept], rtol=0, atol=5e-6)
    for name in ("log_sum", "mean", "variance", "third"):
        a, b = getattr(ours.mix, name)[kept], getattr(exact.mix, name)[kept]
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())
    torch.testing.assert_close(ours.mix.entropy[kept], exact.mix.entropy[kept], rtol=1e-5, atol=5e-6)
    assert torch.equal(ours.max_entropy, exact.max_entropy)
    assert torch.equal(torch.stack(ours.token_logits), torch.stack(exact.token_logits))


@full
@cases(
    "order, top",
    [("as drawn", 130), ("rising", 0), ("rising", 299), ("falling", 299)],
    ["as drawn", "rising", "falling"],
    [0, 130, 299],
    quick=1,
)
def test_an_almost_certain_row_keeps_the_digits_of_its_entropy_wherever_its_top_lies(order: str, top: int) -> None:
    student = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    if order != "as drawn":
        student = student.sort(1, descending=order == "falling").values
    student[:, top] = torch.tensor([14.0, 18.0, 20.0, 22.0, 25.0, 28.0])
    student = student.to(DEVICE)
    stats, _ = run(
        student, student, torch.zeros(6, dtype=torch.int64, device=DEVICE), Target(anchor="student"), Divergence()
    )
    x = student.double() - student[:, top, None].double()
    others = x.masked_fill(x == 0, -torch.inf).exp()
    tail = others.sum(1)
    exact = tail.log1p() - (others * x).sum(1) / (1 + tail)
    assert exact.min() < 1e-8
    torch.testing.assert_close(stats.student_entropy.double(), exact, rtol=3e-6, atol=0)
    beta = stats.beta[stats.status != Status.UNDETERMINED] * 1.75
    torch.testing.assert_close(beta, torch.ones_like(beta), rtol=0, atol=1e-6)


def test_few_rows_are_cut_into_parts_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert pass_launches.num_parts(16384, 19008) == pass_launches.num_parts(4096, 19008) == 1
    assert pass_launches.num_parts(2048, 19008) == 2 and pass_launches.num_parts(64, 19008) == 9
    assert pass_launches.num_parts(1, 152064) == 64 and pass_launches.num_parts(1, 100) == 1


@cases(
    "rule, kind, parts",
    [
        *(("capped", kind, 2) for kind in DIVERGENCES),
        ("teacher alone", "reverse", 5),
        ("teacher alone", "forward", 1),
        ("no teacher", "forward", 1),
    ],
    ["capped", "teacher alone", "no teacher"],
    DIVERGENCES,
    [1, 2, 5],
    quick=1,
)
def test_infinities_and_nan_come_out_as_pytorchs(rule: str, kind: str, parts: int) -> None:
    student, teacher, tokens = logits(13, 512, seed=5)
    masked = torch.rand(512, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    masked[:200] = True  # the first blocks hold no column at all
    student[0, masked] = teacher[0, masked] = -torch.inf
    student[1, masked] = -torch.inf
    teacher[2, 330] = -torch.inf
    student[3, 10], teacher[4, 340] = torch.nan, torch.nan
    student[5, 340], teacher[6, 10] = torch.inf, torch.inf
    student[7, masked] = teacher[7, masked] = torch.finfo(torch.float32).min
    student[8, :511] = teacher[8, :511] = -torch.inf
    teacher[9, masked] = -torch.inf
    student[10], teacher[10] = 0.0, 1.0
    # the last block has neither a new maximum nor an end that a mask cuts, only a column that is missing
    student[11:] = teacher[11:] = torch.linspace(30, -10, 512)
    student[11, 340] = teacher[12, 340] = -torch.inf
    arguments = student, teacher, tokens, TARGETS[rule], DIVERGENCES[kind]
    (ours, gradient), (theirs, expected) = (run(*arguments, backend=name) for name in ("triton", "torch"))
    # of a row with NaN or +inf all that is promised is NaN
    sound = ~torch.isnan(theirs.loss)
    assert torch.equal(torch.isnan(ours.loss), ~sound) and sound.sum() >= 7
    for field in fields(TokenStats):
        if field.name != "grid_betas":
            a, b = getattr(ours, field.name)[sound], getattr(theirs, field.name)[sound]
            torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}")
    assert torch.equal(torch.isfinite(gradient), torch.isfinite(expected))
    finite = torch.isfinite(expected)
    torch.testing.assert_close(gradient[finite], expected[finite], rtol=1e-5, atol=2e-6)


@cases(
    "name, rule, kind, parts",
    [
        ("third pass", "capped", "reverse", 1),
        ("third pass", "strict", "forward", 3),
        ("third pass", "capped", "jsd", 2),
        ("two tied tops", "strict", "reverse", 1),
        ("three tied tops", "capped", "forward", 2),
        ("forks, bf16", "strict", "jsd", 1),
        ("forks, teacher 6 nats less sure, bf16", "capped", "forward", 1),
        ("levels", "strict", "reverse", 2),
    ],
    ["third pass", *plateaus.CLASSES],
    plateaus.TARGETS,
    DIVERGENCES,
    [1, 2, 3],
    quick=1,
)
def test_every_row_is_matched_where_the_entropy_has_a_plateau(name: str, rule: str, kind: str, parts: int) -> None:
    rows = plateaus.needing_the_third_pass() if name == "third pass" else plateaus.draw(name, num_columns=320)
    student, teacher, tokens = (values.to(DEVICE) for values in rows)
    leaf = student.float().requires_grad_()
    arguments = {"target": TARGETS[rule], "divergence": DIVERGENCES[kind], "vocab": VocabShard(0, 320, 320)}
    stats = distillation_loss(leaf, teacher, tokens, **arguments, backend="triton")
    stats.loss.sum().backward()
    stats = stats.detached()
    plateaus.assert_solved(stats, leaf.grad, (student, teacher, tokens), TARGETS[rule], DIVERGENCES[kind])


@full
def test_the_third_pass_leaves_every_other_row_as_it_was() -> None:
    student, teacher, tokens = (values.to(DEVICE) for values in plateaus.needing_the_third_pass())
    grid = BetaGrid.of(Target(anchor="student"), torch.float32)
    shard = Shard(student, teacher, grid.mix_weights, torch.float32)
    sums, argmax = pass_launches.first_pass(shard, grid, tokens, 0)
    solver_state, status, found = solver_launches.solve_tokens(sums, grid), None, []
    for _ in range(2):
        sums = pass_launches.second_pass(shard, solver_state.constants, argmax, forward_kl=False, status=status)
        rows, solver_state = solver_launches.finish_tokens(solver_state, sums, grid, tokens, 320)
        status = rows.status
        found.append((sums.clone(), status.tolist(), rows.beta.clone(), rows.reverse_kl.clone()))
    (_, second, *before), (sums, third, *after) = found
    assert [value == Status.UNCONVERGED for value in second] == [True, False, True, False]
    assert Status.UNCONVERGED not in third and third[1::2] == second[1::2]
    assert (sums[:, 1::2] == 0).all() and (sums[:, ::2, 0] != 0).all()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[1::2], other[1::2]) and (one[::2] != other[::2]).all()


def test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks() -> None:
    student, teacher = torch.zeros(4, 400, device=DEVICE), torch.zeros(4, 400, device=DEVICE)
    student[:, [3, 311]] = 5.0
    teacher[0, [3, 15]] = teacher[1, [311, 320]] = teacher[2, [3, 399]] = teacher[3, [2, 3]] = 5.0
    stats, _ = run(
        student, teacher, torch.zeros(4, dtype=torch.int64, device=DEVICE), Target(anchor="student"), Divergence()
    )
    assert stats.top1_agreement.tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", after(1, DIVERGENCES))
def test_a_tiny_divergence_keeps_its_digits(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    student = 2 * torch.randn(5, 300, generator=generator)
    teacher = (student + 1e-3 * torch.randn(5, 300, generator=generator)).to(DEVICE)
    student, tokens = student.to(DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    stats, gradient = run(student, teacher, tokens, Target("fixed", anchor="student"), DIVERGENCES[kind])
    loss, expected = reference(student, teacher, Target("fixed", anchor="student"), DIVERGENCES[kind])
    assert loss.min() > 1e-9 and loss.max() < 2e-7
    torch.testing.assert_close(stats.loss.double(), loss, rtol=0, atol=3e-10)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-7)


@full
@cases(
    "dtype, kind",
    [(torch.bfloat16, "reverse"), (torch.float16, "forward")],
    [torch.bfloat16, torch.float16],
    DIVERGENCES,
    quick=1,
)
def test_narrow_logits_give_the_statistics_of_the_same_values_in_float32(dtype: torch.dtype, kind: str) -> None:
    student, teacher, tokens = logits(8, 600)
    student, teacher = student.to(dtype), teacher.to(dtype)
    narrow, gradient = run(student, teacher, tokens, Target(anchor="student"), DIVERGENCES[kind])
    wide, expected = run(student.float(), teacher.float(), tokens, Target(anchor="student"), DIVERGENCES[kind])
    assert_same(narrow, wide)
    assert gradient.dtype == dtype
    # the interpreter cuts digits off where a GPU rounds
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), expected, rtol=digits, atol=1e-6)


def bracket_of(solution: BetaSolution) -> Tensor:
    """Return both ends of the bracket, [10, T], in the order of the kernels' state."""
    return torch.stack([*solution.left.tensors(), *solution.right.tensors()])


@cases("rule, forward_kl", [*((rule, True) for rule in TARGETS), ("capped", False)], TARGETS, [False, True], quick=1)
def test_the_solving_kernels_equal_the_solver_in_pytorch(rule: str, forward_kl: bool) -> None:
    """Compare both on the same sums, of 3 shards."""
    student, teacher, tokens = logits(40, 600, seed=7)
    student[30], teacher[31] = torch.nan, -1e4
    student[32:], teacher[32:] = student[32:] * 0.02, teacher[32:] * 5
    # one column above a bulk that melts within one cell of the grid: the last step of the solver is long
    student[20:30], teacher[20:30] = 0.1 * student[20:30], 0.1 * teacher[20:30]
    student[20:30, 0], teacher[20:30, 0] = torch.linspace(5, 9, 10), 3.0
    fork, fork_of_teacher, _ = plateaus.needing_the_third_pass(600)
    student[9], teacher[9] = fork[0].to(DEVICE), fork_of_teacher[0].to(DEVICE)
    weight = round(8 * TARGETS[rule].teacher_weight) / 8  # as exact in a kernel's float32 as in Python
    grid = BetaGrid.of(replace(TARGETS[rule], teacher_weight=weight), torch.float32)
    shards = [
        Shard(student[:, i : i + 200], teacher[:, i : i + 200], grid.mix_weights, torch.float32) for i in (0, 200, 400)
    ]
    passes = [shard_sums.first_pass(shard, grid, tokens, 200 * i) for i, shard in enumerate(shards)]
    gathered = torch.cat([sums for sums, _ in passes])
    results, brackets = [], []
    for module in (solver_launches, token_statistics):
        solver_state, status = module.solve_tokens(gathered, grid), None
        for _ in range(1 if grid.given else 2):
            parts = [
                shard_sums.second_pass(shard, solver_state.constants, argmax, forward_kl=forward_kl, status=status)
                for shard, (_, argmax) in zip(shards, passes, strict=True)
            ]
            rows, solver_state = module.finish_tokens(solver_state, torch.cat(parts), grid, tokens, 600)
            needed, status = status, rows.status.clone()
            if needed is None:
                ends = solver_state.state[6:16] if module is solver_launches else bracket_of(solver_state.solution)
                brackets.append(ends[:, status == Status.UNCONVERGED].clone())
        results.append(rows)
        assert grid.given or weight != 0.75 or needed[9] == Status.UNCONVERGED
    torch.testing.assert_close(*brackets, rtol=1e-6, atol=1e-12)
    ours, theirs = results
    for field in fields(theirs):
        pairs = [(getattr(ours, field.name), getattr(theirs, field.name))]
        if field.name == "constants":
            pairs = list(zip(pairs[0][0].tensors(), pairs[0][1].tensors(), strict=True))
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape, field.name
            tolerances = {"rtol": 2e-7, "atol": 1e-9, "equal_nan": True}  # two roundings to float32
            torch.testing.assert_close(a, b, **tolerances, msg=lambda m, f=field: f"{f.name}: {m}")


@full
@pytest.mark.parametrize("anchored", after(1, [False, True]))
def test_solve_target_finds_what_the_loss_finds_bit_for_bit(anchored: bool) -> None:
    """With a reference, the second logits are the mix already, and the entropy to match is given."""
    student, teacher, tokens = (values[:3] for values in logits(8, 333))
    vocab, target = VocabShard(0, 333, 333), Target(anchor="reference" if anchored else "student")
    entropy = vocab_entropy(logits(8, 333, seed=1)[0][:3], vocab, backend="triton") if anchored else None
    solution = solve_target(student, teacher, target, vocab, reference_entropy=entropy, backend="triton")
    stats, _ = run(student, teacher, tokens, target, Divergence(), reference_entropy=entropy)
    assert torch.equal(solution.beta.float(), stats.beta)
    mix = 1.75 * teacher.double() if anchored else student.double() + 0.75 * teacher.double()
    log_q = solution.beta[:, None] * mix - solution.log_normaliser[:, None]
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(3, device=DEVICE).double(), rtol=0, atol=3e-6)


@full
@pytest.mark.parametrize("parts", after(1, [3, 1]), indirect=True)
def test_of_equal_maxima_also_in_several_parts_the_lowest_column_counts(parts: int) -> None:
    student, teacher, tokens = (values[:2].clone() for values in logits(7, 600))
    student[:, [7, 590]] = 100.0
    teacher[0, 7] = teacher[1, 590] = 100.0
    stats, _ = run(student, teacher, tokens, Target(anchor="student"), Divergence())
    assert stats.top1_agreement.tolist() == [True, False]


@pytest.mark.parametrize(
    "target", after(1, [Target(anchor="reference"), Target(anchor="reference", match="student", k_max=None)])
)
def test_with_a_reference_every_statistic_and_the_gradient_equal_pytorchs(target: Target) -> None:
    """The tokens have their own weights of the teacher."""
    student, mix, tokens = logits(8, 333)
    reference, _, _ = logits(8, 333, seed=1)
    vocab, results = VocabShard(0, 333, 300), []
    for name in ("triton", "torch"):
        leaf = student.clone().requires_grad_()
        entropy = vocab_entropy(reference, vocab, backend=name)
        stats = distillation_loss(
            leaf,
            mix,
            tokens,
            target=target,
            divergence=Divergence("forward_kl"),
            vocab=vocab,
            reference_entropy=entropy if target.needs_reference_entropy else None,
            teacher_weights=torch.linspace(0.3, 2.0, 8, device=DEVICE),
            backend=name,
        )
        stats.loss.sum().backward()
        results.append((stats.detached(), leaf.grad, entropy))
    (ours, gradient, entropy), (theirs, their_gradient, their_entropy) = results
    assert_same(ours, theirs)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=3e-6)
    torch.testing.assert_close(entropy, their_entropy, rtol=1e-6, atol=1e-6)
    assert (ours.status == Status.MATCHED).any()
