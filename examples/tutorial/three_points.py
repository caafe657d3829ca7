# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The problems and the verifier of docs/tutorial.md: questions that should be answered in three numbered points.

``evaluation.verifier=three_points.three_points``, with this directory on PYTHONPATH, names the verifier.

    python examples/tutorial/three_points.py      writes problems.jsonl, other.jsonl and held_out.jsonl
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

INSTRUCTION = "Answer with a numbered list of three points."
OTHER = "Answer in plain English."
"""The instruction of the control, which asks for nothing that the verifier looks for."""
QUESTIONS = ("What is {}?", "Why do people like {}?", "How would you describe {} to a friend?")
TRAINING = """
a volcano; a glacier; a desert; a river; a forest; an island; a cave; a rainbow; the moon; a comet; a storm; fog;
a bridge; a tunnel; a lighthouse; a castle; a museum; a library; a hospital; a farm; a market; a bank; a garden;
a bicycle; a train; a rocket; a sailing boat; a compass; a map; a clock; a telescope; a candle; a mirror; a kite;
coffee; tea; bread; cheese; honey; chocolate; soup; rice; a piano; a violin; a drum; an orchestra; a poem; a novel;
a newspaper; a painting; chess; football; a marathon; a bee; a whale; an owl; a horse; a cat; a dog; an oak tree;
a rose; a mushroom; a password; a robot
"""
HELD_OUT = """
a waterfall; a lake; snow; the sun; a school; a theatre; a windmill; a ship; an aeroplane; a dictionary; salt; a guitar;
a song; a penguin; a frog; a holiday
"""


def three_points(response: str, problem: Any) -> bool:
    """Return whether the numbered lines of the response are 1, 2 and 3."""
    return re.findall(r"^\s*(\d+)[.)] ", response, re.MULTILINE) == ["1", "2", "3"]


def main() -> None:
    """Write the files of problems into the present directory."""
    files = {
        "problems": (TRAINING, 3, INSTRUCTION),
        "other": (TRAINING, 3, OTHER),
        "held_out": (HELD_OUT, 2, INSTRUCTION),
    }
    for name, (things, number, instruction) in files.items():
        problems = [question.format(thing.strip()) for thing in things.split(";") for question in QUESTIONS[:number]]
        lines = [json.dumps({"problem": problem, "solution": instruction}) for problem in problems]
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
