# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""OpenClaw-RL: hints for replies from the messages that follow them, and rewards from the same messages.

Algorithm: Every logged reply that a message follows is a turn; the next message of the user, or the results of its tool
calls, are its next state. With method.live=true the turns are sampled, and the next state of a turn is the reply of the
environment. The model itself, or method.judge, turns the next state into a hint, and again into a reward
of 1, -1 or 0, by the majority of method.votes. The teacher sees the conversation, whose last user message ends in
"[user's hint / instruction]" and the hint. No accepted answer is needed (docs/data.md).

Equation:

    w = 0,   a = A rho with the clip of PPO;   A = w1 (log q - log mu) + w2 r;   w1 = w2 = 1

A logged reply was not sampled from the student, and its mu is unknown. The run takes the student's own probability
before the step as mu, so that rho = 1 and the clip holds nothing. The mu of a sampled turn is that of the sampler. A
turn without a hint keeps its reward; with method.weight=0 it is left out. A sampled turn that no text follows, such as
the last one, has no hint, and the reward of the environment. w1 is method.distill_weight, and w2 is method.weight.

Paper: OpenClaw-RL (arXiv 2603.10165). Published are the advantage with both weights, the clip, one vote, the selection
of hints, their place in the prompt, the rule for tools, the reward without normalisation, temperature, batch and rate.

Differences:
- By default logs take the place of a live service, and therefore rho = 1; our wording of the request around the rule;
  turns with a reward of 0 stay.
- The request says which role the next state has, and that the result of a tool was not available before the
  assistant's action. For a function of method.reward, `problem.reply.next_state` has the messages.
- method.signal=full method.weight=0 optimizer.lr=1e-6 has the divergence over the whole vocabulary in place of the
  sampled token. Peers of the authors report full or top-k distillation as much better than the sampled token; their
  variant has the student's 50 likeliest tokens and a learning rate of 1e-6.

Command:

    selfdistill recipe=openclaw checkpoint.load=... data.tokenizer=... data.path=chats.jsonl run_dir=runs/openclaw
    selfdistill recipe=openclaw method.live=true data.kind=problems environment.name=... environment.max_turns=4 ...

Expected: At thirty times the published rate the method collapses on the small task: .32 to .035 sampled, and .007 with
the full divergence (docs/recipes/comparison.md). The log is static, and nobody trains the prompt with the hint.

Known failure:
- A hint that tells the answer leaks it: look at `leak/hint_8grams`, and at samples (conversations.show_contents=true).
- The change of a token's likelihood under hindsight is near chance as its credit (AUC .505), and the outcome alone did
  better (64.2 % against 24 to 34 % on AIME25, 20B; arXiv 2608.09263).
- A judge that takes the output of a tool for something that the assistant should have known.
- The more the student learns, the less likely the replies of its logs become: `turns/log_prob_mean`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from megatron_selfdistill.chat_logs.replies import Turn, TurnReader
from megatron_selfdistill.config import Config, function_named
from megatron_selfdistill.config.schema.data_config import ConversationsConfig, plays_episodes
from megatron_selfdistill.config.schema.field_checks import require, require_slots
from megatron_selfdistill.config.schema.method_config import LATER, MEASURED, STUDENT, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, NonNegativeInt, OneOf, PositiveInt, Text
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import AssistantReply, Problem
from megatron_selfdistill.data.prompts import filled
from megatron_selfdistill.data.records import finite_number, text_or_none
from megatron_selfdistill.evaluation.verify import judged_in_order
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.parts.hints import HintedLater, Inquiry, asked
from megatron_selfdistill.methods.parts.settings import ClipSettings, RewardSettings, SignalSettings
from megatron_selfdistill.methods.parts.terms import uniform
from megatron_selfdistill.rollout.base import response_text
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms

_ROLES = """\
- role='user': a message of the user, such as a correction, a further request or thanks.
- role='tool': The return value of a tool the assistant invoked. This content was NOT available before the \
assistant's action: it exists BECAUSE the assistant called the tool. A successful, non-error tool output generally \
means the assistant's action was appropriate; do NOT treat it as information the assistant should have already known."""

_TURN = """
## The assistant's response
{response}

## Next state, role='{role}'
{next_state}
"""

JUDGE_TEMPLATE = (
    """\
Below are a response of an assistant and the next state, which followed it. Decide whether the next state reveals
something that would have improved the response, had the assistant known it. The role of the next state matters:
"""
    + _ROLES
    + "\n"
    + _TURN
    + """
If it does, write a concrete hint of 1 to 3 sentences between [HINT_START] and [HINT_END], and end with \\boxed{1}.
If it does not, write no hint, and end with \\boxed{-1}."""
)
"""The request for a hint; ``method.judge_template`` replaces it."""

REWARD_TEMPLATE = (
    """\
Below are a response of an assistant and the next state, which followed it. Decide whether the response did what the
user wanted, with the next state as the evidence. The role of the next state matters:
"""
    + _ROLES
    + "\n"
    + _TURN
    + """
End with \\boxed{1} if the next state shows progress, with \\boxed{-1} if it shows that the response was wrong,
incomplete or unwanted (a request for a change does), and with \\boxed{0} if it shows neither."""
)
"""The request for a reward."""


@dataclass(frozen=True)
class OpenclawSettings(SignalSettings, ClipSettings, RewardSettings):
    """The settings of OpenClaw-RL.

    Here a reward function gets the text of the logged reply and the turn.  Null is the model's own verdict by the next
    message: 1, -1 or 0.
    """

    weight: NonNegativeFloat = 1.0
    """Weight of the rewards in the loss; the advantage of a logged reply is its reward.  With 0, replies without a hint
    are skipped."""
    judge: Annotated[str, OneOf(("model",), or_dotted=True)] = "model"
    """The writer of hints: model (the present weights, asked with judge_template) or the dotted path of a function
    ``judge(problem, response_text, next_state) -> text or None``."""
    judge_template: Text | None = None
    """The request for a hint, with the slots {response}, {role} and {next_state}; it must ask for \\boxed{1} or
    \\boxed{-1} and for a hint between [HINT_START] and [HINT_END].  Null takes the wording in methods/openclaw.py."""
    votes: PositiveInt = 1
    """Number of answers of the model per turn, for hints and for rewards; the longest hint wins."""
    min_length: NonNegativeInt = 10
    """Number of characters that a hint must exceed."""
    live: bool = False
    """Whether the turns are sampled in the run's environment, whose replies are their next states; else they are the
    replies of a log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_slots("method.judge_template", self.judge_template, ("response", "role", "next_state"))

    @property
    def needs(self) -> Needs:
        """What the method needs from the core: on logs it samples nothing, and takes the measured p as mu."""
        judges = self.judge == "model" or (self.weight > 0 and self.reward is None)
        measures = self.weight > 0 or self.signal != "full"
        return Needs(
            samples=STUDENT if self.live else None,
            log_probs=MEASURED if measures else None,
            asks_model=judges,
            hint=LATER,
        )

    teacher_template = "{problem}\n\n[user's hint / instruction]\n{solution}"

    def check(self, config: Config) -> None:
        """Raise `ConfigError` unless there is an environment, or every logged reply that a message follows is taken."""
        super().check(config)
        wanted = config.conversations
        require(
            not self.live or plays_episodes(config),
            "method.live=true samples replies to which an environment replies: set data.kind=problems and "
            "environment.name, or method.live=false for logs",
        )
        require(
            self.live
            or (config.logged and wanted.turns == "all" and wanted.accepted_rule == ConversationsConfig.accepted_rule),
            "method.name=openclaw takes every logged reply that a message follows: it needs data.kind=conversations, "
            "conversations.responses=logged, conversations.turns=all and no conversations.accepted_rule",
        )


JudgedReply = tuple[Problem, str]
"""A turn whose reply has a next state, and the reply's tokens as text, without special tokens and the stop token."""


class Openclaw(HintedLater):
    """OpenClaw-RL."""

    Settings = OpenclawSettings

    def rewarded(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts as they are: `select` gives the rewards, which the next states decide."""
        return list(rollouts), {}

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the turns of this replica that are trained on, with hints and rewards, and metrics.

        The teacher of a turn sees the hint, or where there is none, or the contexts become too long, no hint.  The
        metrics: hints/share, the share of all turns with a hint; with rewards rewards/mean and rewards/trained_share.
        Collectives: those of the judges, and one sum over the data-parallel ranks.
        """
        tokenizer, judges = self.tools.given.builder.tokenizer, self.settings.weight > 0
        texts = [response_text(rollout.response, tokenizer) for rollout in rollouts]
        turns = [with_next_state(rollout, text) for rollout, text in zip(rollouts, texts, strict=True)]
        replies = {i: (turn, texts[i]) for i, turn in enumerate(turns) if turn is not None}
        hints = dict(zip(replies, self._hints(step, [*replies.values()]), strict=True))
        rewarded = list(rollouts)
        if judges:
            for i, reward in zip(replies, self._rewards(step, [*replies.values()]), strict=True):
                rewarded[i] = replace(rewarded[i], reward=reward)
        prompts, trained = self._prompts_with_hints(rollouts, hints), []
        for i, rollout in enumerate(rewarded):
            if i in prompts:
                problem = replace(rollout.problem, solution=prompts[i].solution)
                trained.append(replace(rollout, problem=problem, prompts=prompts[i]))
            elif judges:
                trained.append(rollout.without_hint())
        return trained, self._metrics(rewarded, trained, judges)

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the teacher's part, plus the rewards as advantages."""
        own = self.settings
        terms = uniform(signals, weight=own.distill_weight, signal=own.signal)
        if own.weight > 0:
            advantage = signals.per_token(own.weight * signals.rewards)
            terms += Terms.of(signals.sampled_log_prob, advantage=advantage)
        return terms

    def _hints(self, step: int, replies: Sequence[JudgedReply]) -> list[str | None]:
        """Return the hint for each reply: the longest of the model's votes, or that of the user's function.

        Collectives over the world: those of the sampler, or one all_gather_object.  Raises: `VerifierError` on every
        rank where the function failed, or returned anything but a text or None.
        """
        own = self.settings
        if own.judge == "model":
            votes = self._votes(step, replies, "hint", own.judge_template or JUDGE_TEMPLATE)
            return [longest_hint([hint_in(vote) for vote in of_reply], own.min_length) for of_reply in votes]
        function = function_named("method.judge", own.judge, {})

        def judged(problem: Problem, text: str) -> str | None:
            hint = self._called(lambda: function(problem, text, next_state_of(problem)))
            return longest_hint([text_or_none(hint)], own.min_length)

        return judged_in_order(replies, judged, self.tools.grid, "judge")

    def _rewards(self, step: int, replies: Sequence[JudgedReply]) -> list[float]:
        """Return the reward of each reply: the majority of the model's votes, or that of the user's function.

        Collectives over the world: those of the sampler, or one all_gather_object.  Raises: `VerifierError` on every
        rank where the function failed, or returned no finite number.
        """
        function = self.tools.judge.reward
        if function is None:
            votes = self._votes(step, replies, "reward", REWARD_TEMPLATE)
            return [majority([decision_in(vote) for vote in of_reply]) for of_reply in votes]

        def rewarded(problem: Problem, text: str) -> float:
            return float(self._called(lambda: finite_number(function(text, problem), "reward")))

        return judged_in_order(replies, rewarded, self.tools.grid, "reward function")

    def _votes(self, step: int, replies: Sequence[JudgedReply], kind: str, template: str) -> list[list[str | None]]:
        """Return the votes of the model on each reply.  Collective over the world."""
        n = self.settings.votes
        requests = [(problem, judging_request(problem, text, template)) for problem, text in replies]
        inquiries = [Inquiry(problem, kind, request, vote) for problem, request in requests for vote in range(n)]
        texts = asked(self.tools, step, inquiries)
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def _called(self, call: Callable[[], Any]) -> Any:
        """Return the result of the user's function, whose own message is shown only if it may quote the log."""
        try:
            return call()
        except Exception as error:
            if self.tools.config.conversations.show_contents:
                raise
            kind = type(error).__name__
            raise ValueError(f"{kind}; conversations.show_contents=true shows its message") from None

    def _prompts_with_hints(
        self, rollouts: Sequence[Rollout], hints: Mapping[int, str | None]
    ) -> dict[int, PromptPair]:
        """Return the prompts of the turns with hints, which the last user message shows, by index, where they fit."""
        shown = {i: replace(rollouts[i].problem, solution=hint) for i, hint in hints.items() if hint is not None}
        if self.settings.live:
            given = self.tools.given
            pairs = {i: given.pair_with(replace(it, reworded=None), it.solution) for i, it in shown.items()}
            return {
                i: replace(pair, student_prompt=rollouts[i].prompts.student_prompt)
                for i, pair in pairs.items()
                if pair is not None
            }
        run = self.tools.run_data
        reader = TurnReader(run.builder, run.ends, run.max_length, self.tools.config.data)
        turns = reader.read(list(shown.values())) if shown else []
        return {i: turn.prompts for i, turn in zip(shown, turns, strict=True) if isinstance(turn, Turn)}

    def _metrics(self, rollouts: Sequence[Rollout], trained: Sequence[Rollout], judges: bool) -> dict[str, float]:
        hinted, rewards = sum(rollout.hinted for rollout in trained), sum(one.reward or 0.0 for one in rollouts)
        counts = over_replicas((len(rollouts), hinted, len(trained), rewards), self.tools.grid)
        total, num_hinted, num_trained, reward = counts
        metrics = {"hints/share": num_hinted / max(total, 1)}
        if judges:
            metrics |= {"rewards/mean": reward / max(total, 1), "rewards/trained_share": num_trained / max(total, 1)}
        return metrics


def next_state_of(problem: Problem) -> list[dict[str, Any]]:
    """Return the messages after the reply of a turn."""
    assert problem.reply is not None
    return [dict(message) for message in problem.reply.next_state]


def judging_request(problem: Problem, text: str, template: str) -> str:
    """Return ``template`` with the reply ``text``, the role of the next state, and the texts of its messages."""
    messages = next_state_of(problem)
    state = "\n".join(str(message.get("content", "")) for message in messages)
    return filled(template, {"response": text, "role": messages[0]["role"], "next_state": state})


def with_next_state(rollout: Rollout, text: str) -> Problem | None:
    """Return the problem of a turn with its reply ``text`` and next state; None for a turn that no text follows."""
    problem, reply = rollout.problem, rollout.reply
    if problem.reply is not None:
        return problem
    if reply is None or reply.text is None:
        return None
    message, next_state = {"role": "assistant", "content": text}, {"role": reply.role, "content": reply.text}
    return replace(problem, reply=AssistantReply(message, accepted=False, next_state=(next_state,)))


def hint_in(vote: str | None) -> str | None:
    """Return the last hint of a vote whose last decision is 1; None for every other vote."""
    text, end, _ = (vote or "").rpartition("[HINT_END]")  # a begin without an end would be looked for from each begin
    hints = _HINT.findall(text + end)
    return hints[-1].strip() if hints and decision_in(vote) == 1 else None


def decision_in(vote: str | None) -> int | None:
    r"""Return the last decision ``\boxed{1}``, ``\boxed{-1}`` or ``\boxed{0}`` of a vote; None if there is none."""
    decisions = _BOXED.findall(vote or "")
    return int(decisions[-1]) if decisions else None


def longest_hint(hints: Sequence[str | None], min_length: int) -> str | None:
    """Return the longest hint of more than ``min_length`` characters, the first among equals; None without any."""
    long = [hint.strip() for hint in hints if hint is not None and len(hint.strip()) > min_length]
    return max(long, key=len, default=None)


def majority(decisions: Sequence[int | None]) -> float:
    """Return the most frequent decision, and 0 where several are; None, a vote without a decision, does not count."""
    counts = Counter(decision for decision in decisions if decision is not None).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return 0.0
    return float(counts[0][0])


_BOXED = re.compile(r"\\boxed\{([-+]?[01])\}")
_HINT = re.compile(r"\[HINT_START\](.*?)\[HINT_END\]", re.DOTALL)
