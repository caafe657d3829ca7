# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The backend whose laws a process of tests checks, and the cases, logits and references of its tests.

Triton decides at its import how it runs a kernel, so a process has one backend: PyTorch on a CPU, unless the variable
TRITON_INTERPRET is set.  With 1 the Triton kernels run on CPU tensors in Triton's interpreter, with 0 on the GPU.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from logit_pairs import divergence
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard, distillation_loss, mixed_target

BACKEND = "triton" if "TRITON_INTERPRET" in os.environ else "torch"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if BACKEND == "triton" and not INTERPRETED else "cpu")
FULL = [pytest.mark.full] if INTERPRETED else []
"""The marks of cases that make test skips, because the interpreter takes half a second for a loss."""


def replace_language_once() -> None:
    """Let Triton's interpreter replace the functions of triton.language once in this process.

    The interpreter does so in every call of a function by a kernel, which takes half of the interpreter's time, and
    undoes the replacement after every launch.  A kernel that is compiled cannot follow in the same process.
    """
    from triton import language
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang
    replaced: set[frozenset[int]] = set()

    def replace_once(function: Any) -> SimpleNamespace:
        modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        visible = frozenset(id(module) for module in modules if module in (language, language.core))
        if visible not in replaced:
            replace(function)
            replaced.add(visible)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once


if INTERPRETED:
    replace_language_once()


def every_backend(cases: int = 3, quick: int = 1) -> Callable[[Any], Any]:
    """Run a law with the kernels, too: in the interpreter ``cases`` of it, all but the first ``quick`` as full ones."""

    def mark(law: Any) -> Any:
        law.interpreted = cases, quick
        return law

    return mark


def keep_laws(items: list[Any]) -> list[Any]:
    """Return the laws that this process checks: of the kernels those of every backend, few cases if interpreted."""
    if BACKEND == "torch":
        return items
    kept = []
    for law, group in itertools.groupby(items, key=lambda item: getattr(item, "function", None)):
        number, quick = getattr(law, "interpreted", (0, 0))
        of_law = list(group)
        if INTERPRETED and number:
            of_law = of_law[:: -(-len(of_law) // number)]
            for item in of_law[quick:]:
                item.add_marker(pytest.mark.full)
        kept += of_law if number else []
    return kept


def parts_of(name: str) -> int:
    """Return the number of parts into which the test of this name cuts a row."""
    return (1, 2, 5)[zlib.crc32(name.encode()) % 3]


def cut_rows(monkeypatch: pytest.MonkeyPatch, number: int) -> int:
    """Cut every row into ``number`` parts, if it is long enough; a handful of rows would have one per block."""
    from megatron_selfdistill.kernels import pass_launches

    if INTERPRETED:
        monkeypatch.setattr(pass_launches, "LANES", 64)  # the interpreter's time is per block, not per number
    monkeypatch.setattr(pass_launches, "PART_COLUMNS", 1 if number > 1 else 1 << 30)
    monkeypatch.setattr(pass_launches, "MOST_PARTS", number)
    return number


def full(test: Callable[..., None]) -> Callable[..., None]:
    """Leave a whole test to make test-all, in the interpreter."""
    return pytest.mark.full(test) if INTERPRETED else test


def after(number: int, some: Iterable[Any]) -> list[Any]:
    """Return the cases, of which those after the first ``number`` run in make test-all only, in the interpreter."""
    cases = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=FULL) for case in some]
    return [*list(some)[:number], *cases[number:]]


def cases(names: str, thinned: list[Any], *values: Iterable[Any], quick: int) -> pytest.MarkDecorator:
    """Run all combinations on a GPU; in the interpreter run ``thinned``, in make test its first ``quick`` only."""
    combinations = (
        after(quick, thinned) if INTERPRETED else list(itertools.product(*values) if len(values) > 1 else values[0])
    )
    return pytest.mark.parametrize(names, combinations, indirect=sorted({"parts"} & set(names.split(", "))))


def logits(num_rows: int, num_columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student and teacher, and tokens: sharp, flat, agreeing, equal, rising and tied rows."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 6.0, num_rows)[:, None]
    student = scale * torch.randn(num_rows, num_columns, generator=generator)
    teacher = student + torch.randn(num_rows, num_columns, generator=generator)
    teacher[::3] = 4 * torch.randn(teacher[::3].shape, generator=generator)
    ramp = torch.linspace(-30, 10, num_columns)
    for row, values in ((1, (student[1], student[1])), (2, (ramp, ramp.flip(0))), (4, (ramp, 2 * ramp))):
        student[row], teacher[row] = values
    student[5] = teacher[5] = student[5].round()
    student[6], teacher[6] = ramp.flip(0), teacher[6] + 2000.0
    tokens = torch.randint(num_columns, (num_rows,), generator=generator)
    return student.to(DEVICE), teacher.to(DEVICE), tokens.to(DEVICE)


def run(
    student: Tensor, teacher: Tensor, tokens: Tensor, target: Target, kind: Divergence, *, backend: str = BACKEND
) -> tuple[TokenStats, Tensor]:
    """Return the statistics and the gradient of the student's logits, under different weights of the tokens."""
    leaf = student.clone(memory_format=torch.preserve_format).requires_grad_()
    vocab = VocabShard(0, student.shape[1], student.shape[1])
    stats = distillation_loss(leaf, teacher, tokens, target=target, divergence=kind, vocab=vocab, backend=backend)
    (stats.loss * torch.linspace(-1, 2, len(tokens), device=DEVICE)).sum().backward()
    assert leaf.grad is not None
    return stats.detached(), leaf.grad


def reference(student: Tensor, teacher: Tensor, target: Target, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient under the weights of `run`, by the definition in float64."""
    s = student.double().detach().requires_grad_()
    loss = divergence(s.log_softmax(-1), mixed_target(s.detach(), teacher.double(), target).log_q, kind)
    weights = torch.linspace(-1, 2, len(s), dtype=torch.float64, device=DEVICE)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), s)[0]


def on_cpu(stats: TokenStats) -> TokenStats:
    stats = stats.detached()
    return TokenStats(**{field.name: getattr(stats, field.name).cpu() for field in fields(TokenStats)})


def assert_same(ours: TokenStats, theirs: TokenStats, tolerance: float = 5e-6) -> None:
    """Assert that every statistic is alike, with NaN and infinity at the same places."""
    for field in fields(TokenStats):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        at = partial("{}: {}".format, field.name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=at)
