# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Text adventures of TextWorld as an environment with sessions; the teacher reads the walkthrough.

    export PYTHONPATH=examples
    pip install textworld && python -m environments.textworld_games games --number 10
    selfdistill data.path=games/problems.jsonl environment.name=environments.textworld_games.TextWorldGame \
        environment.options.directory=games environment.max_turns=20 ...

A problem names its game, and its solution is the commands of the walkthrough.  Each response is one command.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import textworld

from megatron_selfdistill.environments import Reply

TASK = "You play a text adventure. Answer with one command, such as: go north"


class TextWorldGame:
    """An environment whose session is one game; the rewards of an episode that wins add up to 1."""

    def __init__(self, directory: str) -> None:
        """``directory``: the games as `write_games` writes them."""
        self.directory, self.score = Path(directory), 0

    def reset(self, problem: Any, seed: int) -> str:
        """Start the game of the problem, which has no random choice, and return its task and its first room."""
        shown = textworld.EnvInfos(objective=True, description=True, max_score=True)
        self.game: Any = textworld.start(str(self.directory / f"{problem.id}.z8"), shown)
        state = self.game.reset()
        return f"\n\n{state.objective.strip()}\n\n{state.description.strip()}"

    def step(self, response: str) -> Reply:
        """Return the game's answer to the response's last line; the reward is the gain in score.

        Only plain characters reach the game, whose interpreter can crash on others.
        """
        command = re.sub(r"[^a-zA-Z0-9 ,.'-]", " ", (response.splitlines() or [""])[-1]).strip()
        state, score, done = self.game.step(command or "look")
        gained, self.score = score - self.score, score
        return Reply(state.feedback.strip(), reward=gained / state.max_score, done=bool(done))

    def close(self) -> None:
        """End the game's interpreter."""
        self.game.close()


def write_games(directory: Path, number: int) -> None:
    """Write games, each with its seed as its number, and problems.jsonl with their walkthroughs as solutions."""
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for seed in range(1, number + 1):
        options = textworld.GameOptions()
        options.seeds, options.path = seed, str(directory / f"game{seed}.z8")
        options.nb_rooms, options.nb_objects, options.chaining.max_depth = 2, 4, 2
        game = textworld.generator.make_game(options)
        textworld.generator.compile_game(game, options)
        solution = "\n".join(game.metadata["walkthrough"])
        records.append({"id": f"game{seed}", "problem": TASK, "solution": solution, "answer": str(seed)})
    (directory / "problems.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def main() -> None:
    """Write the games of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--number", type=int, default=10)
    write_games(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
