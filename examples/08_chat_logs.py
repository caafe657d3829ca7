# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Learning from chat logs: the model samples its conversations once, before training, and nothing while training.

A base that has learnt column subtraction from homework with mistakes, and from conversations, answers problems at
temperature 1.  A scripted user checks each answer.  To a wrong answer the user replies "wrong, again", at most twice; a
right answer ends the conversation with thanks.  After the last wrong answer the user gives the right answer and marks
it.  Then the model scores its own turns with the accepted answers as hints, and moves towards its own predictions with
the hints.

The logs stay the same while the student changes, so after some steps the student might learn from turns that it would
no longer sample.  The default target mixes the teacher with the frozen base, which has written the logs, and so keeps
the student near them.  The second variant also skips turns that the current student finds unlikely.  The third variant
mixes the teacher with the student itself: it drifts away from its logs and forgets.  The last variant samples the same
turns again from the current weights: this is on-policy self-distillation, the baseline.

    python examples/08_chat_logs.py
    python examples/08_chat_logs.py --seeds 5 6 7        with a figure over three seeds
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from _lib import subtraction, subtraction_chats, tables
from _lib.command_line import CONFIG_NAME, console, example_parser, prepare_process
from _lib.curves import GREEDY, SAMPLED, plot_curves
from _lib.measurement import Measurement
from _lib.pretraining import Base, prepared_base, write_records
from _lib.variants import Outcome, Variant
from megatron_selfdistill import config as configuration
from megatron_selfdistill.metrics.run_log import METRICS_FILE, read_metrics

if TYPE_CHECKING:  # torch and Megatron are imported by what needs them: --help answers at once
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.evaluation.inference import Inference

NUM_SESSIONS = 2000
NUM_ATTEMPTS = 3
NUM_STEPS = 200
LOGGED = Variant("Chat logs", ("recipe=chat_logs",))
LIKELY = Variant("Chat logs, likely turns", ("recipe=chat_logs", "method.min_log_prob=-0.2"))
STUDENT_MIX = Variant("Chat logs, mix with the student", ("recipe=chat_logs", "target.anchor=student"))
ON_POLICY = Variant("Sampled anew", ("recipe=chat_logs", "conversations.responses=sampled"))
VARIANTS = (LOGGED, LIKELY, STUDENT_MIX, ON_POLICY)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="run these seeds; draw their mean in one figure")
    options = parser.parse_args(argv)
    prepare_process()
    seeds = options.seeds or [options.seed]
    steps = options.steps or NUM_STEPS
    results = {seed: one_seed(seed, options.directory, steps) for seed in seeds}
    console.print(over_seeds(results))
    directory = options.directory / "chat_logs"
    runs = {
        variant.title: mean_run(
            [outcomes[number].run_dir for _, outcomes in results.values()], directory / "mean" / str(number)
        )
        for number, variant in enumerate(VARIANTS)
    }
    title = f"Self-distillation from chat logs; mean over seeds {', '.join(map(str, seeds))}"
    figure = plot_curves(runs, directory / "chat_logs.png", (GREEDY, SAMPLED), title)
    console.print(f"curves: {figure}\n", soft_wrap=True)
    console.print(
        "Logs teach less than new samples of the model.  With the reference the student stays near its logs; with "
        "target.anchor=student\nit drifts away from them.  Watch turns/log_prob_mean, and evaluate often.",
        soft_wrap=True,
    )
    return 0


def one_seed(seed: int, root: Path, steps: int) -> tuple[Measurement, list[Outcome]]:
    """Pretrain or find the base of a seed, sample its conversations, and train every variant on them."""
    base = prepared_base(subtraction_chats.TASK, seed, root)
    directory = root / "chat_logs" / f"seed{seed}"
    logs = write_records(directory / "conversations.jsonl", conversations(base, seed))
    template = directory / "chat_template.jinja"
    template.write_text(subtraction_chats.CHAT_TEMPLATE)
    settings = (
        f"num_steps={steps}",
        f"data.chat_template={template}",
        "evaluation.num_samples=4",
        "metrics.console_every=50",
    )
    runs = [variant.on(logs, *settings) for variant in VARIANTS]
    return tables.compare(f"Chat logs, seed {seed}", base, runs, directory, panels=(GREEDY, SAMPLED))


def conversations(base: Base, seed: int) -> list[dict[str, Any]]:
    """Return NUM_SESSIONS conversations between the base and the scripted user, as OpenAI-style messages."""
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.evaluation.inference import open_inference

    overrides = [*base.overrides, f"data.path={base.held_out}", f"run_dir={base.directory / 'logs'}"]
    config = configuration.load(overrides, CONFIG_NAME)
    run_data = RunData.load(config)
    problems = subtraction.distinct(NUM_SESSIONS, "train", seed=777 + seed)
    sessions = [Session(a, b) for a, b in problems]
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with open_inference(config, run_data, grid) as inference:
            for attempt in range(NUM_ATTEMPTS):
                open_ones = [session for session in sessions if not session.closed]
                for session, answer in zip(
                    open_ones, answers(open_ones, attempt, inference, run_data, seed), strict=True
                ):
                    session.add_reply(answer, last=attempt + 1 == NUM_ATTEMPTS)
    finally:
        ranks.shutdown()
    right = sum(session.by_the_model for session in sessions)
    console.print(f"{len(sessions)} conversations; in {right} the model found the answer, else the user gave it")
    return [session.record() for session in random.Random(seed).sample(sessions, len(sessions))]


def answers(sessions: Sequence[Session], attempt: int, inference: Inference, run_data: RunData, seed: int) -> list[str]:
    """Return the model's next reply in each conversation, sampled at temperature 1."""
    from megatron_selfdistill.rollout.base import Request, response_text
    from megatron_selfdistill.rollout.sampling import sample_seed

    encode = run_data.tokenizer.encode
    requests = [Request(encode(s.text), sample_seed(seed, 0, s.name, attempt)) for s in sessions]
    return [response_text(r, run_data.tokenizer) for r in inference.sampler.generate(requests, inference.sampling)]


class Session:
    """A conversation with a scripted user who knows the answer."""

    def __init__(self, a: int, b: int) -> None:
        self.name, self.answer = f"{a}-{b}", subtraction.answer(a, b)
        self.messages: list[dict[str, Any]] = [user(subtraction.problem_text(a, b))]
        self.closed = self.by_the_model = False

    @property
    def text(self) -> str:
        """The conversation as the model reads it, in the format of CHAT_TEMPLATE."""
        return "".join(m["content"] + "$" * (m["role"] == "assistant") for m in self.messages)

    def add_reply(self, reply: str, last: bool) -> None:
        """Append the model's reply and the user's response to it; ``last``: no further attempt follows."""
        self.messages.append({"role": "assistant", "content": reply or "_"})
        self.by_the_model = reply.count(";") == 1 and reply.partition(";")[2] == self.answer
        self.closed = self.by_the_model or last
        if self.by_the_model:
            self.messages.append(user("thanks"))  # the default rule recognises that the user accepted the answer
        elif last:
            self.messages.append(user(self.answer) | {"accepted": True})  # the log must mark an answer of the user
        else:
            self.messages.append(user(subtraction_chats.AGAIN))

    def record(self) -> dict[str, Any]:
        """Return the conversation as a line of the JSONL that ``data.path`` names."""
        return {"id": self.name, "messages": self.messages}


def user(text: str) -> dict[str, Any]:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def over_seeds(results: Mapping[int, tuple[Measurement, list[Outcome]]]) -> Table:
    """Return a table with the accuracies of each seed and the seconds per step."""
    seeds = list(results)
    columns = (*(f"seed {seed}" for seed in seeds), "mean greedy", "s per step")
    table = tables.new_table("Held-out accuracy, greedy / sampled at temperature 1", columns)
    before = [measurement for measurement, _ in results.values()]
    table.add_row("before", *(cell(m) for m in before), f"{mean(m.greedy for m in before):.3f}", "")
    for number in range(len(VARIANTS)):
        outcomes = [of_seed[number] for _, of_seed in results.values()]
        after = [outcome.measurement for outcome in outcomes]
        seconds = f"{mean(map(seconds_per_step, outcomes)):.4f}"
        label = tables.label(outcomes[0])
        table.add_row(label, *(cell(m) for m in after), f"{mean(m.greedy for m in after):.3f}", seconds)
    return table


def mean_run(run_dirs: Sequence[Path], directory: Path) -> Path:
    """Write a run directory with the held-out accuracies of several runs, averaged step by step; return it."""
    keys = (GREEDY.key, SAMPLED.key)
    logged = [[line for line in read_metrics(run_dir) if GREEDY.key in line] for run_dir in run_dirs]
    lines = [
        {"step": at_step[0]["step"], **{key: mean(line[key] for line in at_step) for key in keys}}
        for at_step in zip(*logged, strict=True)
    ]
    write_records(directory / METRICS_FILE, lines)
    return directory


def cell(measurement: Measurement) -> str:
    """Return the greedy and the sampled accuracy as text."""
    return f"{measurement.greedy:.3f} / {measurement.sampled:.3f}"


def seconds_per_step(outcome: Outcome) -> float:
    """Return the mean seconds per step without evaluations, except for the first five steps, which warm up."""
    lines = [line for line in read_metrics(outcome.run_dir) if "seconds/step" in line]
    return mean(line["seconds/step"] - line.get("seconds/evaluation", 0.0) for line in lines[5:] or lines)


if __name__ == "__main__":
    sys.exit(main())
