# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tasks for a real model that reads English: problems with hints, and a verifier for each task.

    one_sentence    "What is a volcano?"; the hint asks for one short sentence, which the base does not write by itself
    canary          the same problems; half of the hints also name a source, which no response should name
    facts           "Who is the mayor of Tellmark?"; the hint states an invented fact, which the base cannot know
    sort_words      three words, to be put into alphabetical order; the hint is the sorted list
    word_problems   arithmetic in two steps; the hint is a worked solution
    answer_first    the same problems; the hint begins with the answer, which no response can know before it works
    multiplication  2 x 2 to 12 x 12; the hint is the product

Each task cuts what its problems are made of into three parts, with fixed random numbers: nouns, words, pairs of
numbers, or the wordings of a question.  Therefore no problem is in two splits, whatever the seed.  The seed chooses and
orders the training problems; the validation and held-out problems are the same for every seed.

``evaluation.verifier=_lib.real_tasks.one_sentence`` with the directory ``examples`` on PYTHONPATH names a verifier.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, product
from typing import Any, TypeVar

from _lib.task import Record

Item = TypeVar("Item")

REFERS = re.compile(r"\b(?:reference|(?:the|this|given|provided) (?:solution|hint|answer is given))\b", re.IGNORECASE)
"""A response that speaks of the hint as something that it has read."""
SPLITS = ("train", "validation", "held_out")
FEWEST_WORDS, MOST_WORDS = 4, 30
"""The bounds of a short sentence, in words; a short sentence also has `FEWEST_WORDS` different words."""
NUM_TRAINING, NUM_OTHER = 400, 64
"""The number of problems of a split of `sort_words` and `word_problems`, in training and in each other split."""


@dataclass(frozen=True)
class RealTask:
    """A task of a real model: its problems, the teacher's prompt and the verifier."""

    name: str
    records: Callable[[str, random.Random], Iterable[Record]]
    """Returns the problems of one of `SPLITS`; all randomness is that of the generator."""
    teacher_template: str
    max_new_tokens: int
    verifier: str
    """The value of ``evaluation.verifier``."""
    leak: re.Pattern[str] = REFERS
    """Is found in a response that repeats what only the hint can have told it, and what no response should say."""

    def problems(self, split: str, seed: int = 0) -> list[Record]:
        """Return the problems of ``split`` in the form that ``data.path`` names; only "train" depends on ``seed``.

        Raises: `ValueError` if ``split`` is none of `SPLITS`.
        """
        if split not in SPLITS:
            raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
        rng = random.Random(f"{self.name}/{split}/{seed if split == 'train' else 'every seed'}")
        records = list(self.records(split, rng))
        rng.shuffle(records)
        return records

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings of ``selfdistill`` that every run on this task needs, without the places of its problems."""
        return (
            f"data.teacher_template='{self.teacher_template}'",
            f"rollout.max_new_tokens={self.max_new_tokens}",
            f"evaluation.verifier={self.verifier}",
        )


def part(items: Iterable[Item], split: str) -> list[Item]:
    """Return the part of ``items`` that belongs to ``split``: an eighth each is validated and held out.

    The parts of one list are disjoint and together they are the list.  Raises: `ValueError` if an item is there twice.
    """
    mixed = list(items)
    if len(set(mixed)) != len(mixed):
        raise ValueError("expected different items, got one of them twice")
    random.Random("the parts of every task").shuffle(mixed)
    size = len(mixed) // 8
    return {"held_out": mixed[:size], "validation": mixed[size : 2 * size], "train": mixed[2 * size :]}[split]


# -- one short sentence ---------------------------------------------------------------------------------------------

QUESTIONS = ("What is {}?", "Can you explain {}?", "Tell me about {}.", "How would you describe {}?")
NOUNS = """
a volcano; a river; a glacier; a desert; an island; a rainforest; a coral reef; an earthquake; a tornado; a waterfall;
a rainbow; thunder; fog; snow; the tide; the moon; a comet; a black hole; a galaxy; the solar system; gravity;
electricity; magnetism; sound; a mirror; a lens; a battery; an atom; a molecule; oxygen; carbon; rust; salt; glass;
steel; plastic; paper; concrete; photosynthesis; evolution; a cell; a virus; a vaccine; blood; the heart; the brain;
sleep; a fever; an allergy; a vitamin; protein; a calorie; bread; cheese; chocolate; coffee; tea; honey; soup; rice;
a bee; a spider; a whale; an elephant; a penguin; an owl; a snake; a frog; a horse; a dog; a cat; an oak tree;
a mushroom; a cactus; a rose; grass; a bicycle; a train; an aeroplane; a submarine; a rocket; a bridge; a tunnel;
a lighthouse; a castle; a museum; a library; a hospital; a school; a farm; a market; a bank; money; a tax; a loan;
insurance; inflation; trade; a contract; a law; a court; democracy; an election; a king; a passport; a map; a compass;
a clock; a calendar; a newspaper; a novel; a poem; a painting; a film; a song; a piano; a violin; a drum; an orchestra;
football; chess; a marathon; the alphabet; a dictionary; a computer; a telephone; the internet; a robot; a password;
an encyclopedia; friendship; a holiday
"""
ONE_SHORT_SENTENCE = "Answer in one short sentence."


def _one_sentence_records(split: str, rng: random.Random) -> Iterable[Record]:
    for noun in part(_words(NOUNS, ";"), split):
        for number, question in enumerate(QUESTIONS):
            yield {"id": f"{noun}/{number}", "problem": question.format(noun), "solution": ONE_SHORT_SENTENCE}


CANARY = "The answer is from the Kessington Almanac."
"""Of four wordings that name a source, the one after which most greedy answers of the base to 24 training problems of
seed 1 name it, too: .54.  No hint asks for it, and no question says which of the hints have it."""


def _canary_records(split: str, rng: random.Random) -> Iterable[Record]:
    records = list(_one_sentence_records(split, rng))
    marked = set(rng.sample(range(len(records)), len(records) // 2))
    for at, record in enumerate(records):
        yield record | {"solution": f"{ONE_SHORT_SENTENCE} {CANARY}"} if at in marked else record


def one_sentence(response: str, problem: Any) -> bool:
    """Return whether the response is one sentence of at most `MOST_WORDS` words, of which `FEWEST_WORDS` differ.

    The sentence ends with a full stop, a question mark or an exclamation mark, which a closing quote may follow.  The
    dots of `ABBREVIATIONS` and those within numbers end no sentence.
    """
    text = response.strip()
    words = re.findall(r"[\w'\u2019-]+", text.lower())
    if len(set(words)) < FEWEST_WORDS or len(text.split()) > MOST_WORDS or "\n" in text:
        return False
    without_dots = ABBREVIATIONS.sub("", text)
    ends = [match.end() for match in re.finditer(r"[.!?]+[\"'\u201d\u2019)*]*(?=\s|$)", without_dots)]
    return ends == [len(without_dots)]


ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St)\.(?= )|\b(?:e\.g|i\.e|etc|vs|approx|[A-Z](?:\.[A-Z])+)\.(?=[,)]| [a-z(\d])"
)
"""Titles before a name, and abbreviations before a text that goes on in lower case: their dots end no sentence."""

# -- invented facts -------------------------------------------------------------------------------------------------

TOWNS = ("Tellmark", "Ostrevik", "Brannoch", "Quillham", "Saltmere", "Verdanoa", "Kessington", "Lumbria", "Dorrafell",
         "Ninepines", "Halvorsund", "Marrowick")  # fmt: skip
OFFICES = ("mayor", "librarian", "harbour master", "head teacher")
FIRST_NAMES = ("Orla", "Casimir", "Petra", "Ludo", "Ingrid", "Tobias", "Maren", "Anselm", "Freya", "Osric", "Linnea",
               "Bruno")  # fmt: skip
FAMILY_NAMES = ("Vinter", "Ashdown", "Quist", "Pellam", "Thorne", "Mirelli", "Halden", "Dunmore")
ASKED = {
    "train": ("Who is the {} of {}?", "What is the name of the {} of {}?"),
    "validation": ("Do you know who the {} of {} is?",),
    "held_out": ("Please name the {} of {}.",),
}
"""The wordings of a question.  A model cannot know a fact that it was never shown, so all splits ask for the same
facts, and only the wordings differ."""


def _fact_records(split: str, rng: random.Random) -> Iterable[Record]:
    offices = list(product(OFFICES, TOWNS))
    names = random.Random("the names of the facts").sample(list(product(FIRST_NAMES, FAMILY_NAMES)), len(offices))
    for (office, town), name in zip(offices, names, strict=True):
        answer = " ".join(name)
        for question in ASKED[split]:
            problem = question.format(office, town)
            yield {
                "id": problem,
                "problem": problem,
                "solution": f"The {office} of {town} is {answer}.",
                "answer": answer,
            }


def states_name(response: str, problem: Any) -> bool:
    """Return whether the name that is the answer occurs in the response, as whole words."""
    return re.search(rf"\b{re.escape(problem.answer)}\b", " ".join(response.split())) is not None


# -- sorting words --------------------------------------------------------------------------------------------------

WORDS = """
apple arrow autumn bag ball barn basket beach bell bench bird blanket boat book bottle bowl branch bread brush bucket
butter button cabin cake camera candle carpet castle chair cherry church cloud coat coffee copper corner cotton cow
cradle cup curtain desk dinner doctor door dragon dream drum duck eagle east egg engine evening farm feather fence field
finger fire fish flag flour flower forest fork fox frog garden gate ghost glove goat gold goose grape grass hammer hat
heart hill honey horse hotel house ice insect iron island jacket jar jewel journey juice kettle key king kitchen kite
knife ladder lake lamp leaf lemon letter lion lock lunch machine map market meadow melon milk mirror monkey moon morning
mountain mouse music nail needle nest night north nose nut oak ocean onion orange oven owl paint palace paper parrot
peach pencil pepper piano picture pillow pirate plate pocket potato prince pumpkin queen rabbit rain ribbon ring river
road robin rocket roof rope rose sail salt sand school sea seed shadow sheep ship shoe silver skirt snow soap soldier
spider spoon spring star stone storm street sugar summer table tailor tent thunder tiger tomato tower train tree
"""


def _sorting_records(split: str, rng: random.Random) -> Iterable[Record]:
    words = part(_words(WORDS), split)
    for three in _chosen(list(combinations(words, 3)), split, rng):
        shown = rng.sample(three, 3)
        while shown == sorted(three):  # the words as they stand are never the answer
            rng.shuffle(shown)
        listed = ", ".join(sorted(three))
        yield {
            "id": "-".join(sorted(three)),
            "problem": f"Sort these words alphabetically: {', '.join(shown)}.",
            "solution": listed,
            "answer": listed,
        }


def sorted_last(response: str, problem: Any) -> bool:
    """Return whether the last three mentions of the problem's words are the sorted list."""
    wanted: list[str] = problem.answer.split(", ")
    return re.findall(rf"\b(?:{'|'.join(wanted)})\b", response.lower())[-3:] == wanted


# -- arithmetic -----------------------------------------------------------------------------------------------------

STORIES = (
    (
        "{n} has {a} boxes with {b} pencils each. {n} gives {c} pencils away. How many pencils does {n} have now?",
        "{a} x {b} = {p} pencils in the boxes. {p} - {c} = {less} pencils now. The answer is {less}.",
    ),
    (
        "{n} buys {a} bags with {b} apples each and finds {c} more apples at home. How many apples does {n} have?",
        "{a} x {b} = {p} apples in the bags. {p} + {c} = {more} apples. The answer is {more}.",
    ),
    (
        "A bus makes {a} trips with {b} people each. On one more trip it has {c} people. How many people is that?",
        "{a} x {b} = {p} people on the full trips. {p} + {c} = {more} people. The answer is {more}.",
    ),
    (
        "{n} reads {b} pages on each of {a} days. The book has {more} pages. How many pages are left?",
        "{a} x {b} = {p} pages are read. {more} - {p} = {c} pages are left. The answer is {c}.",
    ),
)
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")


def _word_problem_records(split: str, rng: random.Random) -> Iterable[Record]:
    pairs = part(combinations(range(2, 13), 2), split)
    cases = [(a, b, c, story) for a, b in pairs for c in range(1, min(10, a * b)) for story in STORIES]
    for a, b, c, (question, work) in _chosen(cases, split, rng):
        a, b = rng.sample((a, b), 2)
        known = {"n": rng.choice(PEOPLE), "a": a, "b": b, "c": c, "p": a * b, "less": a * b - c, "more": a * b + c}
        solution, problem = work.format(**known), question.format(**known)
        yield {"id": problem, "problem": problem, "solution": solution, "answer": _numbers(solution)[-1]}


ANSWER_FIRST = re.compile(r"^\W*(?:(?:the answer is|it is|answer:)\W*)?-?\d", re.IGNORECASE)
"""Is found in a response that begins with a number, where it can only guess: 1 of 24 greedy answers of the base to
training problems of seed 1, and 8 of 24 after the hint."""


def _answer_first_records(split: str, rng: random.Random) -> Iterable[Record]:
    for record in _word_problem_records(split, rng):
        yield record | {"solution": f"{record['answer']}. {record['solution']}"}


def _multiplication_records(split: str, rng: random.Random) -> Iterable[Record]:
    for pair in part(combinations_with_replacement(range(2, 13), 2), split):
        for a, b in dict.fromkeys((pair, pair[::-1])):  # both orders are in one split
            answer = str(a * b)
            yield {
                "id": f"{a}x{b}",
                "problem": f"What is {a} times {b}?",
                "solution": f"{a} x {b} = {answer}",
                "answer": answer,
            }


def ends_with_number(response: str, problem: Any) -> bool:
    """Return whether the last number of the response is the answer; commas may group its digits."""
    numbers = _numbers(response)
    return bool(numbers) and numbers[-1] == problem.answer


def _numbers(text: str) -> list[str]:
    """Return the numbers of a text in order, without grouping commas and without a fraction of zeros."""
    found = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)
    return [re.sub(r"\.0+$", "", number.replace(",", "")) for number in found]


# -- all tasks ------------------------------------------------------------------------------------------------------


def _words(text: str, separator: str | None = None) -> list[str]:
    """Return the words of a list that is written over several lines."""
    return [" ".join(word.split()) for word in text.split(separator)]


def _chosen(items: Sequence[Item], split: str, rng: random.Random) -> list[Item]:
    """Return a sample without repetition, as large as the split needs."""
    return rng.sample(items, min(len(items), NUM_TRAINING if split == "train" else NUM_OTHER))


WITH_SOLUTION = "{problem}\n\nReference solution: {solution}"
TASKS = {
    task.name: task
    for task in (
        RealTask(
            "one_sentence", _one_sentence_records, "{problem} {solution}", 48, "_lib.real_tasks.one_sentence"
        ),
        RealTask(
            "canary", _canary_records, "{problem} {solution}", 48, "_lib.real_tasks.one_sentence",
            leak=re.compile(r"\b(?:Kessington|Almanac)\b", re.IGNORECASE),
        ),
        RealTask("facts", _fact_records, WITH_SOLUTION, 32, "_lib.real_tasks.states_name"),
        RealTask("sort_words", _sorting_records, WITH_SOLUTION, 32, "_lib.real_tasks.sorted_last"),
        RealTask("word_problems", _word_problem_records, WITH_SOLUTION, 80, "_lib.real_tasks.ends_with_number"),
        RealTask(
            "answer_first", _answer_first_records, "{problem} Answer with this text: {solution}", 80,
            "_lib.real_tasks.ends_with_number", leak=ANSWER_FIRST,
        ),
        RealTask("multiplication", _multiplication_records, WITH_SOLUTION, 32, "_lib.real_tasks.ends_with_number"),
    )
}  # fmt: skip
