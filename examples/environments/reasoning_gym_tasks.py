# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Tasks of reasoning-gym as problems of one turn, and its own verifiers.

    export PYTHONPATH=examples
    pip install reasoning-gym && python -m environments.reasoning_gym_tasks gsm.jsonl gsm_symbolic --number 1000
    selfdistill data.path=gsm.jsonl evaluation.verifier=environments.reasoning_gym_tasks.verify ...

The solution is the worked solution where the task has one (gsm_symbolic), and else the answer.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import reasoning_gym

from megatron_selfdistill.evaluation.verify import final_answer


@lru_cache(maxsize=16)
def task_of(name: str, number: int, seed: int) -> Any:
    """Return ``number`` entries of a task, which are a function of the arguments."""
    return reasoning_gym.create_dataset(name, size=number, seed=seed)


def write_problems(path: Path, name: str, number: int, seed: int) -> None:
    """Write the entries of a task as problems, whose ids say how `verify` makes them again."""
    records = []
    for i, entry in enumerate(task_of(name, number, seed)):
        solution = entry["metadata"].get("answer_cot") or str(entry["answer"])
        record = {"id": f"{name}/{number}/{seed}/{i}", "problem": entry["question"], "solution": solution}
        records.append(record | {"answer": str(entry["answer"])})
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def verify(response: str, problem: Any) -> bool:
    """Return whether the task gives the final answer of the response its full score."""
    name, number, seed, i = problem.id.split("/")
    task = task_of(name, int(number), int(seed))
    return bool(task.score_answer(final_answer(response), task[int(i)]) == 1)


def main() -> None:
    """Write the problems of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("name", help="a task of reasoning-gym, such as gsm_symbolic or countdown")
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    write_problems(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
