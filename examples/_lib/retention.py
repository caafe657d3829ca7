# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What must stay when a real model learns a task: its English, and its answers to questions that are no part of a task.

Three figures judge the answers without a verifier: their length, the share of 4-grams that they repeat, and their mean
log-probability under the base.  A model that forgets or collapses repeats itself, or gives answers that surprise the
base.  The perplexity of `TEXT` needs no answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from _lib.hugging_face import load
from megatron_selfdistill.evaluation.estimators import distinct_grams

if TYPE_CHECKING:  # torch is imported by the functions that need it, so that --help answers at once
    from torch import Tensor

NUM_NEW_TOKENS = 64
"""The length of the longest answer, in tokens."""

TEXT = """\
A river begins where water cannot sink any further into the ground. It may be a spring in a meadow, the edge
of a glacier, or a lake that has filled its bed to the brim. From there the water follows the slope. It takes
sand and small stones along, and where the valley becomes flat it lays them down again. In this way a river
builds its own banks and moves them, a little every year. People who settle beside a river know both sides of
it. The water feeds their fields and carries their boats, and in some springs it enters their cellars.

The oldest clocks had no hands. A stick in the ground throws a shadow, and the shadow moves as the day goes
by. On cloudy days, and at night, other means were needed: water that drips from one bowl into another, a
candle with marks, sand in a glass. Each of them measures time by something that happens evenly. A modern
watch does the same with a crystal that swings more than thirty thousand times a second. The principle has not
changed, but the steps have become very small.

Bread needs only flour, water, salt and patience. Yeast is a living thing. It eats the sugar in the dough and
gives off a gas, which makes the bubbles that we see when we cut a loaf. If the dough is kept warm, this takes
an hour or two; in a cold kitchen it may take the whole night. Bakers say that slow dough tastes better, and
chemists can tell them why: other substances form as well, and they need more time than the gas does. In the
oven the outside dries and turns brown, while the inside stays soft, because water cannot become hotter than
its boiling point.

A library lends more than books. It lends quiet, a chair, and the help of somebody who knows where things are.
When the first public libraries opened, many people feared that readers would not bring the books back. Some
did not, but most of them did, and the shelves grew. Today a large part of what a library offers has no weight
at all. Still, children come on Saturday mornings to hear a story, students fill the tables before an
examination, and an old man reads the newspaper from the first page to the last, as he has done for years.

When two people trade, each of them gives away something that he needs less than the other does. That is why
both can be better off, although nothing new has been made. Money only makes it easier: the shoemaker no
longer has to find a farmer who happens to need shoes. It also makes it possible to save, to lend and to owe.
A price tells a great many strangers how scarce a thing is, without any of them having to know why. If the
harvest fails in one country, people in another bake smaller cakes, and most of them never hear the reason.
"""

QUESTIONS = (
    "Why do leaves change colour in autumn?",
    "How does a sailing boat move against the wind?",
    "What are the main causes of the tides?",
    "Why is the sky blue?",
    "How do birds find their way when they migrate?",
    "What is the difference between weather and climate?",
    "Why do we need sleep?",
    "How is cheese made?",
    "What happens when water boils?",
    "How do plants get their food?",
    "Give three tips for a good night's sleep.",
    "Give two reasons to learn a second language.",
    "List four things that one should take on a long walk.",
    "Name three famous rivers in Europe.",
    "Name the planets of our solar system.",
    "Which animals sleep through the winter?",
    "Which season comes after spring?",
    "How many days does a leap year have?",
    "What is the capital of France?",
    "What is the largest ocean on Earth?",
    "Who wrote the play Romeo and Juliet?",
    "Who was the first person to walk on the Moon?",
    "Write a short poem about the rain.",
    "Write the first lines of a story about a lost dog.",
    "Write a short letter that thanks a neighbour for help.",
    "Write a birthday wish for a friend.",
    "Describe a busy market on a Saturday morning.",
    "Describe how to make a cup of tea.",
    "Explain how to change the tyre of a bicycle.",
    "Explain how to boil an egg.",
    "Explain why people pay taxes.",
    "Explain the rules of a simple card game.",
    "How can I save money on food?",
    "How can I learn to play the guitar?",
    "How can I become a better public speaker?",
    "How should I prepare for a job interview?",
    "How do I keep a houseplant alive?",
    "What should I cook for dinner tonight?",
    "What is a good present for a child of ten?",
    "What should I do if I cannot fall asleep?",
    "What are the advantages of living in a city?",
    "What are the disadvantages of travelling by car?",
    "What did people eat before there were refrigerators?",
    "What would happen if the Moon disappeared?",
    "Why do some metals rust while others do not?",
    "Why are some people afraid of the dark?",
    "Why does ice float on water?",
    "Why did the Roman Empire fall?",
    "Is it better to exercise in the morning or in the evening?",
    "Should children have homework?",
)
"""General questions.  None of them is a problem of a task, and many of them ask for more than one sentence."""


@dataclass(frozen=True)
class Retention:
    """The figures of one model."""

    perplexity: float
    """The exponential of the mean cross-entropy, in nats per token, of `TEXT`; lower is better."""
    length: float
    """The mean length of the greedy answers in tokens, with the token that ends an answer."""
    repeated: float
    """The mean share of the 4-grams of an answer that occurred in it before."""
    log_prob: float
    """The mean log-probability of a token of the answers under the base, in nats; mean over the answers."""


def retention(hf: Path, base: Path, questions: Sequence[str]) -> Retention:
    """Return the figures of the model in the Hugging Face directory ``hf``, compared with ``base``, in float32.

    Both models run on the GPU if there is one.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = load(hf)
    model.to(device)
    prompts = [prompt_of(tokenizer, question) for question in questions]
    given = answers(model, prompts, tokenizer)
    perplexity = perplexity_of(model, tokenizer(TEXT)["input_ids"])
    _, judge = load(base)
    judge.to(device)
    return Retention(
        perplexity=perplexity,
        length=mean(map(len, given)),
        repeated=mean(map(repeated_share, given)),
        log_prob=mean(mean_log_prob(judge, *asked) for asked in zip(prompts, given, strict=True)),
    )


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens of the chat that asks ``question`` and waits for the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def answers(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, num_new_tokens: int = NUM_NEW_TOKENS
) -> list[list[int]]:
    """Return the tokens of the greedy answers to the prompts, in one batch, each with its end if it has one."""
    import torch

    width, end = max(map(len, prompts)), tokenizer.eos_token_id
    padded = [[end] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
    generated: list[list[int]] = tokens[:, width:].tolist()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in generated]


def perplexity_of(model: Any, tokens: Sequence[int]) -> float:
    """Return the perplexity of a text under the model, from its second token on."""
    import torch

    return float(torch.exp(-_log_probs(model, tokens)[1:].mean()))


def mean_log_prob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the mean log-probability of a token of ``answer`` after ``prompt``, in nats."""
    return float(_log_probs(model, [*prompt, *answer])[len(prompt) :].mean())


def _log_probs(model: Any, tokens: Sequence[int]) -> Tensor:
    """Return the log-probability of each token after the tokens before it, [s]; that of the first token is 0."""
    import torch

    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return torch.cat((chosen.new_zeros(1), chosen))


def repeated_share(tokens: Sequence[int]) -> float:
    """Return the share of the 4-grams of ``tokens`` that occurred before; 0 if there is no 4-gram."""
    different = distinct_grams([tokens])
    return 0.0 if different is None else 1.0 - different
