# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SKALD: rewards, and a teacher that sees a skill card without the answer, only where the card is measured to help.

Algorithm: Each problem gets 8 responses of the student, and 8 more after the teacher's prompt, which shows the skill
card of the problem; the data give it in the place of a solution. All are judged. The student's responses learn their
rewards as in GRPO. Those to a problem whose hinted responses have the higher mean reward also learn what the current
weights say behind the card. So a group that is all wrong, which has no advantages, still has a signal. A card that
states the answer is not shown.

Equation:

    a = A rho with the clip of PPO (see grpo)
    w = c where the gate of the problem is open, else 0
    gate: mean reward after the card - mean reward without it > 0
    D = KL( q || student ),   q = softmax( t + tau s ), a constant

t and s are the logits of teacher and student. The gradient of D is that of -1 / tau times the log of the sum over v of
softmax(t)_v p_v^tau: the teacher's cross-entropy under an exponential tilt. It gives tokens that the student finds very
unlikely less weight, and tends to the teacher's cross-entropy as tau tends to 0. c is method.distill_weight, and tau is
1 / target.teacher_weight, where target.k is the same number; target=teacher_alone is tau = 0.

Paper: SKALD (arXiv 2608.09826), of which the abstract was read, and two summaries by others that say they used the full
text. No code of the authors was found. Published in the abstract are abstract cards from which explicit answers are
filtered, both views of one model, the student's own prefixes, an exponential tilt that is annealed with forward KL as
its limit, and a gate that opens where verified rollouts estimate a positive advantage of the teacher. The gains over
GRPO are 2.5, 4.9 and 12.0 points with 0.6, 1.7 and 4 billion parameters. Second-hand is that tau falls linearly from .8
to 0.

Differences:
- The abstract states no formula. The form of the tilt is this project's reading: its limit is the published one.
- Ours is tau = .4 throughout (second-hand: from .8 to 0), which is the mean of that course.
- Ours are a gate for each problem of each step, 8 hinted responses, c = 1, advantages and clip of GRPO, the wording,
  and the filter, which finds the answer as a word of the card. A summary can be read as one gate for the whole run.
- The cards belong to the data; how the authors write theirs is not known to us.

Command: Each record needs an answer, and a card in the field that data.fields.solution names.

    selfdistill recipe=skald data.fields.solution=card checkpoint.load=... data.tokenizer=... \
        data.path=problems.jsonl run_dir=runs/skald

Expected: No gain over rewards alone. 100 steps of 4 x 8 responses end at a sampled accuracy of .95 at 3e-4, and `grpo`
ends at .97 (SKALD at 1e-4: .74, at 1e-3: .89). After 25 steps it is .49, and .81 for `grpo`: the teacher's part slows
the rewards. The gate is open for .24 of the responses. These are validation problems of the last task of
docs/recipes/comparison.md, whose base reads skills (seed 20, one run each); the other seeds have not run.

Known failure:
- The gate is an estimate from few samples: with 8 responses on each side, a card that does nothing opens it for many of
  the problems that are sometimes solved. method.num_hinted and rollout.num_samples make it sharper.
- An answer of one letter or digit is a word of many cards, which are then left out: look at `hints/share`, and set
  method.filters_answers=false.
- A shuffled card gives more than half of the gain (second-hand), so that a gain alone does not show that cards teach.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_selfdistill.config.schema.method_config import SAMPLED, Needs
from megatron_selfdistill.config.schema.ranges import PositiveInt
from megatron_selfdistill.methods.default import Metrics, SelfDistillation
from megatron_selfdistill.methods.parts.hints import hinted_responses
from megatron_selfdistill.methods.parts.settings import AdvantageSettings, DistillSettings
from megatron_selfdistill.methods.parts.terms import uniform, with_rewards
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


@dataclass(frozen=True)
class SkaldSettings(DistillSettings, AdvantageSettings):
    """The settings of SKALD."""

    num_hinted: PositiveInt = 8
    """Number of responses per problem and step that are sampled after the teacher's prompt, to measure its advantage;
    nothing is trained on them."""
    filters_answers: bool = True
    """Whether a card that has the problem's answer as a word is not shown; its problem trains on rewards alone."""

    needs = Needs(log_probs=SAMPLED, rewards=True, group_size=2, asks_model=True)
    required = ("environment.name=none", "rollout.guidance=none")

    teacher_template = (
        "{problem}\n\nHere is a skill that may help with problems of this kind:\n\n{solution}\n\n"
        "Solve the problem step by step, in your own words."
    )


class Skald(SelfDistillation):
    """Skill-anchored latent distillation."""

    Settings = SkaldSettings

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return all rollouts, those without an open gate without a teacher, and metrics.

        The metrics: hints/share, the share of the rollouts with an open gate, and skills/advantage, the mean over the
        problems with a card of the reward that the card adds.
        Collectives over the world: those of the sampler and of the judge; one sum over the data-parallel ranks.
        """
        groups: dict[int, list[Rollout]] = {}
        for one in rollouts:
            groups.setdefault(one.group, []).append(one)
        shown = {group: plain for group, plain in groups.items() if self._shows_card(plain[0])}
        after_card = self._hinted_rewards(step, [plain[0] for plain in shown.values()])
        gained = {
            group: mean_gain(hinted, [one.reward or 0.0 for one in plain])
            for (group, plain), hinted in zip(shown.items(), after_card, strict=True)
        }
        chosen = [one if gained.get(one.group, 0.0) > 0 else one.without_hint() for one in rollouts]
        num_open = sum(one.hinted for one in chosen)
        counts = over_replicas((num_open, len(chosen), sum(gained.values()), len(gained)), self.tools.grid)
        opened, number, gain, num_shown = counts
        return chosen, {"hints/share": opened / max(number, 1), "skills/advantage": gain / max(num_shown, 1)}

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the divergence for the tokens with an open gate, plus the advantages of the rewards."""
        own = self.settings
        return with_rewards(uniform(signals, weight=own.distill_weight, signal="full"), signals, own)

    def _shows_card(self, rollout: Rollout) -> bool:
        card, answer = rollout.prompts.solution, rollout.problem.answer
        return rollout.hinted and not (self.settings.filters_answers and states_answer(card, answer))

    def _hinted_rewards(self, step: int, firsts: Sequence[Rollout]) -> list[list[float]]:
        """Return the rewards of the responses after the card of each problem; ``firsts``: a rollout of each problem."""
        number = self.settings.num_hinted
        asked = [one for one in firsts for _ in range(number)]
        responses = hinted_responses(self.tools, firsts, number, "card", step)
        hinted = [Rollout(one.problem, one.prompts, response) for one, response in zip(asked, responses, strict=True)]
        rewards = self.tools.judge.rewards(hinted)
        return [rewards[i : i + number] for i in range(0, len(rewards), number)]


def mean_gain(hinted: Sequence[float], plain: Sequence[float]) -> float:
    """Return the mean of ``hinted`` less the mean of ``plain``, the measured advantage of the teacher."""
    return sum(hinted) / len(hinted) - sum(plain) / len(plain)


def states_answer(card: str, answer: str | None) -> bool:
    """Return whether ``card`` has the ``answer`` as a word: no letter, digit or underscore stands next to it."""
    wanted = (answer or "").strip()
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", card) is not None
