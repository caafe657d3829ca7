# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A few responses of a step as text, with the numbers of each token."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair, EpisodeTurn
from megatron_selfdistill.data.tokenizer import pieces
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.loss.target import Status
from megatron_selfdistill.pipeline.score import over_last_stage
from megatron_selfdistill.pipeline.token_losses import StepOutput

if TYPE_CHECKING:
    from rich.text import Text

    from megatron_selfdistill.data.tokenizer import Tokenizer


def step_samples(
    output: StepOutput | None,
    contexts: Sequence[tuple[ContextPair, SeenHint]],
    count: int,
    tokenizer: Tokenizer,
    grid: RankGrid,
    read_again: Callable[[Sequence[ContextPair]], StepOutput | None] | None = None,
) -> Callable[[], Sequence[Sample]] | None:
    """Return a function that makes samples of the first ``count`` problems; None except on the first replica.

    The result is also None if there is nothing to show.  ``contexts``: the responses, each with what its teacher sees.
    ``read_again``: returns the statistics of the shown responses, where ``output`` lacks numbers of the teacher; every
    replica calls the function, with the responses that it shows.
    Collectives: as in `token_numbers`, on the ranks of the first replica, and those of ``read_again``.
    """
    shown = chosen([context for context, _ in contexts], count) if grid.dp_rank == 0 else []
    if read_again is not None:
        shown = chosen([context for context, _ in shown], count)  # with the spans of these responses alone
        output = read_again([context for context, _ in shown])
    if not shown or output is None:
        return None
    with_controls = all(context.control_prompts for context, _ in shown)
    numbers = token_numbers(output, [span for _, span in shown], grid, with_controls=with_controls)
    hint_of = {id(context): hint for context, hint in contexts}
    return lambda: [
        sample_of(context, hint_of[id(context)], known, tokenizer)
        for (context, _), known in zip(shown, numbers, strict=True)
    ]


def token_numbers(
    output: StepOutput, spans: Sequence[range], grid: RankGrid, *, with_controls: bool = False
) -> list[dict[str, list[float]]]:
    """Return, for each span of ``PackedBatch.response_tokens``, one float64 per token for each of `NUMBERS`.

    ``with_controls``: whether `OF_CONTROLS` follow, which ``output`` has measured at these tokens.

    ``spans``: ascending ranges without a common index, equal on all ranks of the replica.  Every rank of the replica
    gets the values.
    Collectives: those of `gathered_rows`, of 5 or 7 float64 per token.
    """
    stats, names = output.stats, (*NUMBERS, *(OF_CONTROLS if with_controls else ()))
    held = None if stats is None else torch.stack([getattr(stats, name).double() for name in NUMBERS], 1)
    if held is not None and with_controls:
        assert output.measures is not None and output.measures.kl_of_control is not None, "controls are measured"
        held = torch.cat([held, output.measures.kl_of_control], 1)
    values = gathered_rows(held, output.response_ids, spans, len(names), grid).t()
    per_span = torch.split(values.cpu(), [len(span) for span in spans], dim=1)
    return [dict(zip(names, part.tolist(), strict=True)) for part in per_span]


def gathered_rows(
    held: Tensor | None, response_ids: Tensor, spans: Sequence[range], width: int, grid: RankGrid
) -> Tensor:
    """Return the rows [n, width], float64 on the device, of the n response tokens of ``spans``, one span after another.

    ``held``: the rows [R, width] of the tokens ``response_ids [R]``, which lie on the last pipeline stage, spread over
    its context-parallel ranks; None on the other stages.  ``spans``: as for `token_numbers`.  Every rank of the replica
    gets the rows.
    Collectives: `over_last_stage`, then a broadcast over the pipeline.
    """
    wanted = torch.tensor([index for span in spans for index in span], dtype=torch.int64)
    values = torch.zeros(len(wanted), width, dtype=torch.float64, device=grid.device)
    if grid.is_last_stage:
        if held is not None:
            ids = response_ids.cpu()
            found = torch.isin(ids, wanted).nonzero().squeeze(1)
            places = torch.searchsorted(wanted, ids[found])
            values[places.to(grid.device)] = held[found.to(grid.device)]
        values = over_last_stage(values, grid)
    if grid.pp_size > 1:
        dist.broadcast(values, grid.last_stage_rank, group=grid.pp_group)
    return values


class SeenHint(NamedTuple):
    """The hint in the prompt of a response's teacher."""

    text: str
    """The text; "" if the teacher sees none."""
    teacher: str = ""
    """The names of the teachers, with a note of each one that sees no hint; "" if its only teacher has no name."""


NUMBERS = ("loss", "student_log_prob", "teacher_log_prob", "beta", "status")
"""The fields of `TokenStats` that a sample has of each token; NaN where the loss has no teacher."""
OF_CONTROLS = ("general", "specific")
"""What a sample has of each token with controls: KL(c || a) and KL(t || c), see `TokenMeasures`."""
_DIGITS = 6  # significant digits of a number in the record


@dataclass(frozen=True)
class SampleToken:
    """One token of a response."""

    id: int
    text: str
    """The text that the token adds; "" for the first parts of a character, which the last part adds completely."""
    loss: float
    """The token's loss before weights, in nats."""
    student_log_prob: float
    """The student's log-prob of the token, in nats."""
    teacher_log_prob: float | None
    """The teacher's log-prob, conditioned on problem and solution, in nats; None without a teacher."""
    k: float | None
    """The temperature of the mixed logits; None without a teacher."""
    status: str | None
    """The name of the rule or limit that gave k (`loss.target.Status`); None without a teacher."""
    general: float | None = None
    """What any hint makes the model do here, in nats; None without controls."""
    specific: float | None = None
    """What only this hint says here, in nats; None without controls."""

    @property
    def log_ratio(self) -> float:
        """The teacher's log-prob of the token minus the student's, in nats; 0 without a teacher.

        A negative value means that the token is less likely for the teacher.  A difference that is not a number is 0,
        too.
        """
        ratio = 0.0 if self.teacher_log_prob is None else self.teacher_log_prob - self.student_log_prob
        return 0.0 if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Sample:
    """One response of a step, with its problem and the solution in the teacher's prompt."""

    problem_id: str
    prompt: str
    """The text of the student's prompt, special tokens included."""
    solution: str
    """The hint, which only the teacher's prompt shows; "" if no teacher of this response sees one."""
    tokens: Sequence[SampleToken]
    """The tokens of the response, its stop token included."""
    truncated: bool
    """Whether the response reached its greatest length without a stop token."""
    turn: EpisodeTurn | None = None
    """The place of the response in its episode; None outside of episodes of several turns."""
    teacher: str = ""
    """The name of the teacher, as in `SeenHint`."""

    @property
    def response(self) -> str:
        """The text of the response: its tokens joined."""
        return "".join(token.text for token in self.tokens)

    def continues(self, other: Sample) -> bool:
        """Return whether both samples are turns of one episode."""
        return self.turn is not None and other.turn is not None and self.problem_id == other.problem_id

    @property
    def has_teacher(self) -> bool:
        """Whether the sample has a teacher's numbers."""
        return any(token.teacher_log_prob is not None for token in self.tokens)

    @property
    def news(self) -> tuple[float, float] | None:
        """The means of `OF_CONTROLS` over the tokens; None without controls or tokens."""
        pairs = [(t.general, t.specific) for t in self.tokens if t.general is not None and t.specific is not None]
        return (fmean(general for general, _ in pairs), fmean(own for _, own in pairs)) if pairs else None

    def record(self) -> dict[str, Any]:
        """Return the sample as plain values: texts, and one list per number with an entry per token."""
        token_lists: dict[str, list[Any]] = {"id": [t.id for t in self.tokens], "text": [t.text for t in self.tokens]}
        token_lists |= {
            name: [_rounded(getattr(token, name)) for token in self.tokens]
            for name in ("loss", "student_log_prob", "teacher_log_prob", "k")
        }
        token_lists["status"] = [token.status for token in self.tokens]
        if self.news is not None:
            token_lists |= {name: [_rounded(getattr(token, name)) for token in self.tokens] for name in OF_CONTROLS}
        return {
            "problem_id": self.problem_id,
            "prompt": self.prompt,
            "solution": self.solution,
            **({"teacher": self.teacher} if self.teacher else {}),
            "response": self.response,
            "truncated": self.truncated,
            **(asdict(self.turn) if self.turn else {}),
            "tokens": token_lists,
        }


def chosen(contexts: Sequence[ContextPair], count: int) -> list[tuple[ContextPair, range]]:
    """Return the first response of each of the first ``count`` problems, with its span in the step's response tokens.

    A response of an episode comes with the other turns of this episode, each once.
    The span indexes ``PackedBatch.response_tokens``, in which the responses of all ``contexts`` follow each other.
    """
    episodes: dict[str, int | None] = {}
    found: dict[tuple[str, int], tuple[ContextPair, range]] = {}
    start = 0
    for context in contexts:
        end, turn = start + len(context.response), context.turn
        episode, number = (None, 0) if turn is None else (turn.episode, turn.turn)
        if episodes.setdefault(context.problem_id, episode) == episode:
            found.setdefault((context.problem_id, number), (context, range(start, end)))
        start = end
    kept = list(episodes)[:count]
    return [one for (name, _), one in found.items() if name in kept]


def sample_of(
    context: ContextPair, hint: SeenHint, numbers: Mapping[str, Sequence[float]], tokenizer: Tokenizer
) -> Sample:
    """Return a response as a `Sample`; ``numbers``: an entry of `token_numbers`."""
    texts = pieces(context.response, tokenizer)
    columns = zip(context.response, texts, *numbers.values(), strict=True)
    return Sample(
        problem_id=context.problem_id,
        prompt=tokenizer.decode(context.student_prompt),
        solution=hint.text,
        tokens=[_token(*column) for column in columns],
        truncated=context.truncated,
        turn=context.turn,
        teacher=hint.teacher,
    )


def _token(token: int, text: str, *numbers: float) -> SampleToken:
    loss, student_log_prob, teacher_log_prob, beta, status, *of_controls = numbers
    if math.isnan(beta):
        return SampleToken(token, text, loss, student_log_prob, None, None, None)
    name = Status(int(status)).name.lower()
    return SampleToken(token, text, loss, student_log_prob, teacher_log_prob, 1 / beta, name, *of_controls)


def _rounded(value: float | None) -> float | str | None:
    """Return ``value`` to `_DIGITS` digits; a value that JSON lacks (NaN, infinities) becomes a string."""
    if value is None or not math.isfinite(value):
        return None if value is None else str(value)
    return float(f"{value:.{_DIGITS}g}")


STRONG = 1.0
"""The smallest difference of log p(token) between teacher and student, in nats, with which a token is marked."""
PROMPT_END, SOLUTION_START = 400, 400
"""The numbers of characters shown of the prompt's end and of the solution's start."""
RESPONSE_START, RESPONSE_END = 1500, 500
"""The numbers of characters shown of the response's start and end; samples.jsonl has the complete response."""
TOP = 5
"""The number of tokens with the largest loss that are listed."""

LESS, MORE = ("[-", "-]", "red"), ("{+", "+}", "green")
"""The marks around a token that is less or more likely for the teacher, in wdiff's notation, and its colour."""


def console_text(sample: Sample, heading: str, *, coloured: bool) -> Text:
    """Return the sample as lines for the console: prompt, hint, response with its marks, and a legend."""
    from rich.text import Text

    text = Text(f"--- {heading}: problem {visible(sample.problem_id)}\n")
    for name, part in _around(sample):
        text.append(f"{name}: ", "bold" if coloured else "")
        text.append(f"{visible(part)}\n")
    text.append("response: ", "bold" if coloured else "")
    for token in _shown(sample.tokens):
        if isinstance(token, str):
            text.append(token)
        else:
            before, behind, colour = _mark(token)
            text.append(f"{before}{visible(token.text)}{behind}", colour if coloured else "")
    text.append("\n(cut at rollout.max_new_tokens)" if sample.truncated else "")
    if sample.has_teacher:
        less, more = f"{LESS[0]}less likely{LESS[1]}", f"{MORE[0]}more likely{MORE[1]}"
        text.append(f"\nmarks: {less} or {more} by {STRONG:g} nat or more for the teacher than for the student")
        text.append(f"\nlargest loss: {_largest(sample)}")
    if (news := sample.news) is not None:
        text.append("\nnews per token: {:.3g} nats that any hint has, {:.3g} of this one only".format(*news))
    return text


def sample_html(sample: Sample) -> str:
    """Return the text of the sample as HTML; all of it is escaped."""
    return f"<pre>{html.escape(console_text(sample, 'sample', coloured=False).plain, quote=False)}</pre>"


def _around(sample: Sample) -> Iterator[tuple[str, str]]:
    prompt, solution = sample.prompt, sample.solution if sample.turn is None else sample.turn.hint
    yield "prompt", f"... {prompt[-PROMPT_END:]}" if len(prompt) > PROMPT_END else prompt
    if sample.teacher:
        yield "teacher", sample.teacher
    if solution:
        yield "hint", f"{solution[:SOLUTION_START]} ..." if len(solution) > SOLUTION_START else solution


def _shown(tokens: Sequence[SampleToken]) -> Iterator[SampleToken | str]:
    """Yield the tokens of a response; in a long response, a number of tokens replaces the middle."""
    if sum(len(token.text) for token in tokens) <= RESPONSE_START + RESPONSE_END:
        yield from tokens
        return
    start, end = _fitting(tokens, RESPONSE_START), len(tokens) - _fitting(tokens[::-1], RESPONSE_END)
    yield from tokens[:start]
    yield f" [... {end - start} tokens ...] "
    yield from tokens[end:]


def _fitting(tokens: Sequence[SampleToken], room: int) -> int:
    """Return the number of first tokens that together have at most ``room`` characters."""
    for count, token in enumerate(tokens):
        room -= len(token.text)
        if room < 0:
            return count
    return len(tokens)


def _mark(token: SampleToken) -> tuple[str, str, str]:
    if abs(token.log_ratio) < STRONG:
        return "", "", ""
    return LESS if token.log_ratio < 0 else MORE


def _largest(sample: Sample) -> str:
    """Return the tokens with the largest loss above 0, with their log-ratio, k and status."""
    known = [token for token in sample.tokens if token.teacher_log_prob is not None and token.loss != 0]
    if not known:
        return "0 at every token: teacher and student agree"
    return ", ".join(
        f"{token.text!r} {token.loss:.3g} (teacher - student {token.log_ratio:+.2f}, k {token.k:.2f}, {token.status})"
        for token in sorted(known, key=lambda token: -token.loss)[:TOP]
    )
