# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Seeds, and how one token is sampled from one row of logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from responses import chi_square_p_value

from megatron_selfdistill.config import load
from megatron_selfdistill.rollout import sampling
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.factory import engines_of
from megatron_selfdistill.rollout.sampling import invert_cdf, require_room, sample_seed, sample_uniforms, select_tokens

NUM_DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0, 1.2, 0.0, -0.4, 1.9, -7.0], dtype=torch.float32)


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 1, **changes})


def expected_probs(temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """Return the sampling distribution, computed token by token in float64."""
    logits = LOGITS.double() / temperature
    probs = (logits - logits.logsumexp(0)).exp()
    ranked = sorted(range(len(probs)), key=lambda v: (-probs[v].item(), v))
    kept = ranked[: top_k or len(ranked)]
    mass, nucleus = sum(probs[v].item() for v in kept), []
    for v in kept:
        if sum(probs[w].item() for w in nucleus) >= top_p * mass:
            break
        nucleus.append(v)
    cut = torch.zeros_like(probs)
    cut[nucleus] = probs[nucleus]
    return cut / cut.sum()


def draw(sampling: SamplingParams, count: int = NUM_DRAWS) -> torch.Tensor:
    return select_tokens(LOGITS.expand(count, -1), torch.from_numpy(sample_uniforms(17, count)), sampling)[0]


CASES = [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 6, "top_p": 0.7}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_drawn_frequencies_match_the_distribution(case):
    assert chi_square_p_value(draw(params(**case)), expected_probs(**case)) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_probs_are_of_the_model_and_of_the_distribution_drawn_from(case):
    uniforms = torch.linspace(0, 1, 200, dtype=torch.float64)[:-1]
    tokens, log_probs, sampled = select_tokens(LOGITS.expand(199, -1), uniforms, params(**case))
    torch.testing.assert_close(log_probs, LOGITS.double().log_softmax(0)[tokens])
    torch.testing.assert_close(sampled, expected_probs(**case).log()[tokens])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_beyond_the_tokenizer_are_never_drawn_and_the_rest_is_renormalised(case):
    beyond = torch.cat([LOGITS, torch.tensor([9.0, -1.0])])  # the likeliest id has no token
    uniforms = torch.from_numpy(sample_uniforms(17, 500))
    rows = beyond.double().expand(500, -1)
    tokens, log_probs, drawn = select_tokens(rows, uniforms, params(**case, num_ids=10))
    assert torch.equal(tokens, draw(params(**case), 500))
    of_model = beyond.double().log_softmax(0)[tokens]
    assert torch.allclose(log_probs, of_model, atol=1e-12), "of the model, over all its ids"
    assert torch.allclose(drawn, expected_probs(**case).log()[tokens], atol=1e-12)
    greedy, log_probs, _ = select_tokens(beyond[None], uniforms[:1], params(temperature=0, num_ids=10))
    assert greedy.tolist() == [0] and log_probs.item() == pytest.approx(beyond.double().log_softmax(0)[0].item())


def test_greedy_takes_the_lowest_id_among_equals_and_is_certain_and_top_k_the_lowest_ids():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    tokens, log_probs, sampled = select_tokens(logits, torch.zeros(2), params(temperature=0))
    assert tokens.tolist() == [1, 0]
    uniforms = torch.linspace(0, 1, 100, dtype=torch.float64)[:-1]
    assert set(select_tokens(torch.zeros(99, 8), uniforms, params(top_k=3))[0].tolist()) == {0, 1, 2}
    torch.testing.assert_close(log_probs, logits.double().log_softmax(-1)[[0, 1], tokens])
    assert sampled.tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_have_the_error_of_float32(dtype, temperature):
    """The bound is the documented one; rows have peaks, ties, huge logits, and tokens without probability."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 3001, generator=generator) * torch.logspace(-1, 2, 64)[:, None]
    logits[5], logits[6, ::2], logits[7] = 3.0, -torch.inf, logits[7] + 1e4
    logits, uniforms = logits.to(dtype), torch.rand(64, generator=generator, dtype=torch.float64)
    tokens, log_probs, sampled = select_tokens(logits, uniforms, params(temperature=temperature))
    for found, scale in ((log_probs, 1.0), (sampled, temperature)):
        if scale:
            exact = (logits.double() / scale).log_softmax(-1)
            below = (logits.double().amax(-1, keepdim=True) - logits.double()) / scale
            mean = (exact.exp() * below.nan_to_num(posinf=0)).sum(-1)
            of_tokens = (each.gather(-1, tokens[:, None]).squeeze(-1) for each in (exact, below))
            expected, distance = of_tokens
            assert ((found - expected).abs() <= 2.0**-23 * (distance + mean + 2)).all()
    if temperature:
        cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
        starts = cdf.gather(-1, (tokens - 1).clamp(min=0)[:, None]).squeeze(-1) * (tokens > 0)
        ends = cdf.gather(-1, tokens[:, None]).squeeze(-1)
        assert ((starts - 1e-6 < uniforms) & (uniforms < ends + 1e-6)).all()


def test_rows_without_a_number_say_nan_and_give_valid_tokens():
    logits = 5 * torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    logits[7, 3], logits[8] = torch.nan, -torch.inf
    before = logits.clone()
    for temperature in (0.0, 1.0):
        tokens, log_probs, _ = select_tokens(logits, torch.zeros(40), params(temperature=temperature))
        assert log_probs.isnan().nonzero().flatten().tolist() == [7, 8]
        assert ((tokens >= 0) & (tokens < 1000)).all()
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [511, 512, 513, 2000])
def test_every_place_of_a_block_is_drawn_in_its_interval(size):
    """The reference sums all ids in order; of equal weights, each token has its own uniform in the middle."""
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0, 5e-20]).repeat(size // 5 + 1)[:size].double()
    cdf = weights.cumsum(0)
    middles = (cdf - weights / 2) / cdf[-1]
    drawn = weights > 1e-10
    tokens, log_probs = invert_cdf(weights.expand(size, -1), middles)
    assert torch.equal(tokens[drawn], torch.arange(size)[drawn])
    torch.testing.assert_close(log_probs[drawn], (weights / cdf[-1]).log()[drawn])


def test_the_ends_of_the_uniforms_draw_tokens_that_have_probability():
    logits = torch.tensor([[-float("inf"), 1.0, -float("inf"), 1.0, -float("inf")]])
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert select_tokens(logits, torch.zeros(1), params())[0].tolist() == [1]
    assert select_tokens(logits, last, params())[0].tolist() == [3]


def test_groups_of_rows_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(33, 50, generator=generator), torch.rand(33, generator=generator)
    whole = select_tokens(logits, uniforms, params(top_p=0.9))
    monkeypatch.setattr(sampling, "_MAX_ELEMENTS", {"cpu": 200})
    for a, b in zip(whole, select_tokens(logits, uniforms, params(top_p=0.9)), strict=True):
        assert torch.equal(a, b)


def test_a_stream_is_named_by_all_four_and_stays_what_it_is():
    names = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (0, 11, "a", 0)]
    assert len({sample_seed(*name) for name in names}) == len(names)
    # Recorded once: a run that is resumed by another version must go on with the same streams.
    assert sample_seed(7, 3, "problem-12", 1) == 10685169939071405998
    recorded = [0.6255847786179023, 0.13910364796510188]
    np.testing.assert_array_equal(sample_uniforms(10685169939071405998, 2), recorded)


def test_the_first_uniforms_do_not_depend_on_how_many_are_wanted():
    np.testing.assert_array_equal(sample_uniforms(5, 100)[:7], sample_uniforms(5, 7))
    np.testing.assert_array_equal(sample_uniforms(5, 7), np.random.Generator(np.random.Philox(key=5)).random(7))


def test_a_prompt_is_not_empty_and_leaves_room():
    for shortest, longest in ((0, 4), (1, 5)):
        with pytest.raises(ValueError, match=r"empty prompt|5 tokens and max_new_tokens is 6"):
            require_room(shortest, longest, max_new_tokens=6, max_length=10)
    require_room(1, 4, max_new_tokens=6, max_length=10)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("rollout.engine=megatron", "engine=megatron"),
        ("rollout.engine=vllm", "trainer's ranks"),
        ("rollout.engine=vllm rollout.placement=server rollout.servers=[http://node7:8000]", "node7"),
    ],
)
def test_a_message_names_the_engines_that_sample(options, named):
    assert named in engines_of(load(options.split()))
