# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Quests of TextWorld in three commands, two rooms and a coin, which a tiny model plays in letters.

    prompt      Q07:
    response    n$           a command of `COMMANDS`
    reply       +            the command has done something; "-" if it has not
    hint        Hnec|        the letters of the walkthrough

The base follows a walkthrough and knows no quest: without a hint it chooses among all commands.  The package textworld
plays the quests: one game of its challenge coin_collector for each, with rooms that lead nowhere.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from _lib.task import Record, Task
from megatron_selfdistill.environments import Reply

COMMANDS = {"n": "go north", "e": "go east", "s": "go south", "w": "go west", "c": "take coin"}
NUM_QUESTS = 16
NUM_COMMANDS = 3
MAX_TURNS = 4
"""The responses of an episode: one command may fail."""
LEVEL = 100 + NUM_COMMANDS
"""The level of coin_collector with as many commands, and rooms that lead nowhere."""
FOLLOWED = 0.95
"""How often the base follows a walkthrough."""


class CoinQuest:
    """An environment whose session is one quest; the reward of taking the coin is 1."""

    def __init__(self, directory: str) -> None:
        """``directory``: the games as `write_quests` writes them.

        The first game of a process imports for 60 ms, and a session is a copy of this process.
        """
        import textworld

        self.directory, self.start = Path(directory), textworld.start
        self.start(str(self.directory / "0.z8")).close()

    def reset(self, problem: Any, seed: int) -> None:
        """Start the quest of the problem, which has no random choice."""
        self.game: Any = self.start(str(self.directory / f"{problem.id}.z8"))
        self.game.reset()

    def step(self, response: str) -> Reply:
        """Return whether the command has done something.  A letter that is no command does nothing."""
        state, score, done = self.game.step(COMMANDS.get(response, "look at the ceiling"))
        moved = state.feedback.lstrip().startswith("-=") or score > 0
        return Reply("+" if moved else "-", reward=float(score), done=bool(done))

    def close(self) -> None:
        """End the interpreter of the game."""
        self.game.close()


def write_quests(directory: Path) -> list[Record]:
    """Write the games with their seeds as numbers, and return their problems; the solutions are the walkthroughs."""
    import textworld
    from textworld.challenges import coin_collector

    directory.mkdir(parents=True, exist_ok=True)
    records, letters = [], {command: letter for letter, command in COMMANDS.items()}
    for number in range(NUM_QUESTS):
        options = textworld.GameOptions()
        options.seeds, options.path, options.force_recompile = number + 1, str(directory / f"{number}.z8"), True
        game = coin_collector.make({"level": LEVEL}, options)
        textworld.generator.compile_game(game, options)
        walkthrough = "".join(letters[command] for command in game.walkthrough)
        records.append({"id": str(number), "problem": f"Q{number:02d}:", "solution": walkthrough})
    return records


def corpus_row(rng: random.Random) -> tuple[str, str, str]:
    """Return a row (prompt, input text, target text): a state of a quest, and the next command.

    In half of the rows a walkthrough is there, and the command is its next one in `FOLLOWED` of them.  All other
    commands are random.
    """
    walkthrough = "".join(rng.choices("nesw", k=NUM_COMMANDS - 1)) + "c"
    done, spoilt = rng.randrange(NUM_COMMANDS), rng.random() < 0.3
    said = [f"{letter}+" for letter in walkthrough[:done]]
    if spoilt:
        said.insert(rng.randint(0, done), f"{rng.choice('neswc')}-")
    hinted = rng.random() < 0.5
    follows = hinted and rng.random() < FOLLOWED
    text = (walkthrough[done] if follows else rng.choice("neswc")) + "$"
    hint = f"H{walkthrough}|" if hinted else ""
    return f"Q{rng.randrange(NUM_QUESTS):02d}:{hint}{''.join(said)}", text, text


def training_problems(seed: int) -> list[Record]:
    """Refuse: the quests are files of an experiment."""
    raise NotImplementedError("write_quests makes the problems with their games")


def held_out_problems() -> list[Record]:
    """Return one problem, which pretraining does not read."""
    return [{"id": "0", "problem": "Q00:", "solution": "nec", "answer": "nec"}]


TASK = Task(
    "coin_quests",
    alphabet="0123456789QH:|+-neswc$_",  # '$' ends a text, '_' pads
    corpus_row=corpus_row,
    training_problems=training_problems,
    held_out_problems=held_out_problems,
    shows_work=lambda response: True,
    overrides=("rollout.max_new_tokens=2",),
)
