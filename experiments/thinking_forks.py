# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs on choosing_subtraction.py: what remains of attempts, checks and forks when a sure teacher trains a base."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import choosing_subtraction

from _lib.pretraining import Base
from _lib.variants import Variant
from _lib.watched_runs import QUIET, opened, watch

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.data.contexts import ContextPair
    from megatron_selfdistill.evaluation.evaluation_result import Transcript
    from megatron_selfdistill.trainer import Trainer

NUM_SAMPLES = 4
UNSURE = 0.3
"""Entropy in nats from which a token of the base counts as unsure."""


@dataclass(frozen=True)
class ForkTokens:
    """Responses of a base, and the tenth of their tokens at which the base has the greatest entropy."""

    contexts: list[ContextPair]
    ids: list[int]
    """Indices of the fork tokens among all response tokens, in the order of the contexts."""
    entropy: float
    """Mean entropy of the base on the fork tokens, in nats."""
    unsure: float
    """Share of all response tokens on which the base's entropy is at least `UNSURE`."""

    @classmethod
    def of_base(cls, base: Base, variant: Variant, path: Path) -> ForkTokens:
        """Return the fork tokens that ``path`` holds; without this file, sample them from the base and write it."""
        from megatron_selfdistill.data.contexts import ContextPair

        if not path.exists():
            settings = (*base.overrides, *variant.overrides, *QUIET, "data.global_batch_size=64", "num_steps=1")
            with opened((*settings, f"run_dir={path.with_suffix('')}")) as trainer:
                contexts = list(trainer.next_batch().contexts)
                entropies = student_entropies(trainer, contexts)
            ids = sorted(sorted(range(len(entropies)), key=lambda i: -entropies[i])[: len(entropies) // 10])
            found = cls(
                contexts,
                ids,
                sum(entropies[i] for i in ids) / len(ids),
                sum(entropy >= UNSURE for entropy in entropies) / len(entropies),
            )
            path.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        stored = json.loads(path.read_text(encoding="utf-8"))
        return cls(**stored | {"contexts": [ContextPair(**pair) for pair in stored["contexts"]]})

    def entropy_under(self, trainer: Trainer) -> float:
        """Return the mean entropy of the trainer's student on the fork tokens, in nats."""
        entropies = student_entropies(trainer, self.contexts)
        return sum(entropies[i] for i in self.ids) / len(self.ids)


def student_entropies(trainer: Trainer, contexts: Sequence[ContextPair]) -> list[float]:
    """Return the student's entropy at each response token in nats, in the order of the contexts; on one rank."""
    output = trainer.learner.measure(contexts)
    assert output.stats is not None
    found = [0.0] * len(output.response_ids)
    for index, entropy in zip(output.response_ids.tolist(), output.stats.student_entropy.tolist(), strict=True):
        found[index] = entropy
    return found


def measured_thinking(variant: Variant, base: Base, run_dir: Path, steps: Sequence[int]) -> dict[str, Any]:
    """Train ``variant`` and return a list of the values at all steps for each figure, and the entropy on fork tokens.

    ``steps`` are those of `watched_runs.watch`; (0,) measures the base.
    Returns: also fork_entropy, the student's entropy after the last step on the base's fork tokens; base_fork_entropy
    and unsure, the base's own figures; hinted, the figures of the samples with hints after the last step.
    """
    forks = ForkTokens.of_base(base, variant, run_dir.parent / f"forks-seed{base.seed}.json")
    left: list[float] = []
    hinted: dict[str, float] = {}

    def at_end(trainer: Trainer) -> None:
        left.append(forks.entropy_under(trainer))
        responses = trainer.evaluate(hinted=True, num_transcripts=None).transcripts
        hinted.update(figures_of([response for response in responses if response.sample is not None]))

    points = watch(
        variant,
        base,
        run_dir,
        steps,
        num_samples=NUM_SAMPLES,
        further=figures_of,
        at_end=at_end,
    )
    names = ("step", "greedy", "sampled", "shows_work", "entropy")
    found: dict[str, Any] = {name: [_rounded(getattr(point, name)) for point in points] for name in names}
    found |= {name: [_rounded(point.further[name]) for point in points] for name in points[0].further}
    (fork_entropy,) = left
    own = {"fork_entropy": fork_entropy, "base_fork_entropy": forks.entropy, "unsure": forks.unsure}
    found |= {name: round(value, 4) for name, value in own.items()}
    return found | {"hinted": {name: round(value, 4) for name, value in hinted.items()}}


def figures_of(samples: Sequence[Transcript]) -> Mapping[str, float]:
    """Return the figures of choosing_subtraction.py; the id of a problem ends with the right letter."""
    return choosing_subtraction.figures([(sample.problem_id[-1], sample.response) for sample in samples])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
