# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What is compared with controls and is no setting of the trainer: patches for one run on one rank.

TOP-D (arXiv 2607.04751): the target is alpha t + (1 - alpha) s in probabilities, alpha = .3.
SDPO's trust region (its appendix A.1): the teacher's weights are (1 - m) of the start and m of the student, m = .05.
Own hint: every control reads the problem's own hint, so that t = c and nothing may be learnt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ALPHA, STUDENT_SHARE = 0.3, 0.05


@contextlib.contextmanager
def proximal_teacher() -> Iterator[None]:
    """Give the loss log(alpha t + (1 - alpha) s) as the teacher, whose target is the teacher alone."""
    from megatron_selfdistill.pipeline import token_losses

    original = token_losses.self_distillation

    def make(*arguments: Any, **options: Any) -> Any:
        loss = original(*arguments, **options)

        def of_logits(student: Any, teacher: Any, *rest: Any) -> Any:
            import torch

            both = torch.stack([teacher.float().log_softmax(-1), student.detach().float().log_softmax(-1)])
            shares = torch.tensor([ALPHA, 1 - ALPHA]).log()[:, None, None]
            return loss(student, (both + shares).logsumexp(0), *rest)

        return of_logits

    token_losses.self_distillation = make
    try:
        yield
    finally:
        token_losses.self_distillation = original


@contextlib.contextmanager
def trust_region() -> Iterator[None]:
    """Move the teacher's weights after every step to a point between the start of the run and the student."""
    import torch

    from megatron_selfdistill.learner import Learner

    original, starts = Learner.apply_gradients, dict[int, list[torch.Tensor]]()

    def apply_gradients(self: Learner, norm: float) -> float:
        teacher = self.teachers.start
        start = starts.setdefault(id(self), [mine.detach().clone() for mine, _ in teacher._pairs()])
        rate = original(self, norm)
        with torch.no_grad():
            for first, (mine, theirs) in zip(start, teacher._pairs(), strict=True):
                mine.copy_(first.lerp(theirs, STUDENT_SHARE))
        teacher._weights_changed()
        return rate

    Learner.apply_gradients = apply_gradients  # type: ignore[method-assign]
    try:
        yield
    finally:
        Learner.apply_gradients = original  # type: ignore[method-assign]


@contextlib.contextmanager
def own_hint() -> Iterator[None]:
    """Let every control show the problem's own hint."""
    from megatron_selfdistill.data.controls import Controls

    original = Controls.prompts

    def prompts(self: Controls, step: int, problem: Any) -> tuple[list[int], ...]:
        return (self.given.pair(problem).teacher_prompt,) * self.number

    Controls.prompts = prompts  # type: ignore[method-assign]
    try:
        yield
    finally:
        Controls.prompts = original  # type: ignore[method-assign]


PATCHES: Mapping[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "topd": proximal_teacher,
    "trust_region": trust_region,
    "controls_own_hint": own_hint,
    "controls_own_hint_eps": own_hint,
}
"""Name of an arm -> what its runs need."""
