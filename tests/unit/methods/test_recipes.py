# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of the methods: the published losses with their gradients, the weights, and the keys that contradict."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from logit_pairs import entropy, kl
from made_methods import composed, made
from term_arrays import signals
from torch import Tensor

from megatron_selfdistill.config import ConfigError, load
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.target import unit_mix


def rows() -> list[Tensor]:
    """Return float64 logits: flat, sharp, equal, tied and contradicting rows, beside random ones."""
    generator = torch.Generator().manual_seed(4)
    s, t, r = (2 * torch.randn(12, 9, generator=generator, dtype=torch.float64) for _ in "str")
    t[:3] *= torch.tensor([0.0, 0.3, 8.0]).double()[:, None]
    t[3], s[4], t[4] = s[3] + 3.0, torch.zeros(9), torch.zeros(9)
    s[5, :2] = t[5, 2:4] = 12.0
    s[6], t[6] = torch.linspace(-4, 4, 9).double(), torch.linspace(4, -4, 9).double()
    return [s, t, r]


# The losses by their definitions, of log-probs, with a gradient to those of the student alone.


def eopd(p: Tensor, t: Tensor, r: Tensor, threshold: float) -> Tensor:
    return kl(p, t) + torch.where(entropy(t) > threshold, kl(t, p), 0.0)


def sr_opsd(p: Tensor, t: Tensor, r: Tensor, order: float, direction: str) -> Tensor:
    """Return the Renyi divergence to the geometric mean of teacher and reference, or from it."""
    q = ((t + r) / 2).log_softmax(-1)
    first, other = (p, q) if direction == "reverse_kl" else (q, p)
    return (order * first + (1 - order) * other).logsumexp(-1) / (order - 1)


def beta_opsd(p: Tensor, t: Tensor, r: Tensor, beta: float) -> Tensor:
    return kl(p, (t / beta + (1 - 1 / beta) * r).log_softmax(-1))


def veto(p: Tensor, t: Tensor, r: Tensor, alpha: float) -> Tensor:
    return kl((alpha * t + (1 - alpha) * p).log_softmax(-1).detach(), p)


def skald(p: Tensor, t: Tensor, r: Tensor, tau: float) -> Tensor:
    """Return KL(q || p), with the gradient of the teacher's cross-entropy under a tilt."""
    tilted = -(t + tau * p).logsumexp(-1) / tau
    return kl((t + tau * p).log_softmax(-1), p).detach() + tilted - tilted.detach()


def case(published: Any, *overrides: str, **values: Any) -> Any:
    return pytest.param(partial(published, **values), list(overrides), id=f"{published.__name__}-{values}")


@pytest.mark.parametrize(
    ("published", "overrides"),
    [
        case(eopd, threshold=0.8),
        *(case(eopd, f"method.threshold={x}", threshold=x) for x in (0.0, 1.5, 100.0)),
        case(sr_opsd, order=0.5, direction="reverse_kl"),
        *(case(sr_opsd, f"method.order={x}", order=x, direction="reverse_kl") for x in (0.05, 2.0, 4.0)),
        case(sr_opsd, "loss.divergence=forward_kl", order=0.5, direction="forward_kl"),
        *(case(beta_opsd, f"target.teacher_weight={1 / (x - 1)}", beta=x) for x in (1.1, 2.0, 17.0)),
        *(case(veto, f"target.teacher_weight={x / (1 - x)}", alpha=x) for x in (0.0, 0.25, 0.9)),
        *(case(skald, f"target.teacher_weight={1 / x}", f"target.k={1 / x}", tau=x) for x in (0.05, 0.4, 1.0)),
    ],
)
def test_value_and_gradient_of_a_recipe_are_those_of_the_published_loss(published, overrides):
    config = composed(f"recipe={published.func.__name__}", *overrides)
    (s, t, r), target = rows(), Target.configured(config.target)
    student, leaf = s.clone().requires_grad_(), s.clone().requires_grad_()
    wanted = published(student.log_softmax(-1), t.log_softmax(-1), r.log_softmax(-1))
    found = distillation_loss(
        leaf,
        unit_mix(r, t, target.teacher_weight).double() if target.is_anchored else t,
        torch.zeros(len(s), dtype=torch.int64),
        target=target,
        divergence=Divergence.configured(config.loss, config.method),
        vocab=VocabShard(0, s.shape[1], s.shape[1]),
    )
    wanted.sum().backward()
    found.loss.sum().backward()
    bounds = {"rtol": 1e-5, "atol": 2e-6} if target.is_anchored else {"rtol": 1e-11, "atol": 1e-12}  # float32 mixes
    torch.testing.assert_close(found.loss.detach(), wanted.detach(), **bounds)
    torch.testing.assert_close(leaf.grad, student.grad, **bounds)


@pytest.mark.parametrize("recipe", ["beta_opsd", "eopd", "sr_opsd", "u_opsd", "veto"])
def test_a_method_of_a_divergence_alone_weighs_the_tokens_with_a_hint_alike(recipe):
    method = made([f"recipe={recipe}"], tiny.given())
    terms = method.terms(0, [], signals([0.0] * 2, lengths=[2, 1], hinted=[True, False]))
    assert not method.weighs_tokens and terms.divergence.tolist() == [1, 1, 0]


EPISODES = "environment.name=replying.Replying environment.max_turns"
MEANS = ["loss.normalize=sequences", "loss.rollout_correction=truncated"]
REFUSED = {
    "dapd": [*MEANS, "data.solutions=none", f"{EPISODES}=2"],
    "past": [*MEANS, "method.hint_template='{solution}'", "teacher.weights=frozen", "method.num_retries=1"],
    "rlcsd": ["loss.normalize=sequences", "method.weight=0", "rollout.num_samples=1", f"{EPISODES}=2"],
    "rltf_sd": ["environment.name=none", f"{EPISODES}=1"],
    "rltf_fm": ["environment.name=none", f"{EPISODES}=1"],
    "skald": ["rollout.num_samples=1", "environment.name=a.B", "rollout.guidance=mixed"],
    "sr_opsd": ["loss.divergence=jsd"],
    "u_opsd": ["rollout.num_samples=1"],
    "openclaw": ["data.kind=problems"],
}


@pytest.mark.parametrize(("recipe", "overrides"), [(name, one) for name, several in REFUSED.items() for one in several])
def test_what_contradicts_a_method_is_refused_with_its_key(recipe, overrides):
    with pytest.raises(ConfigError, match=overrides.split()[-1].partition("=")[0].replace(".", r"\.")):
        load([f"recipe={recipe}", *overrides.split()])
