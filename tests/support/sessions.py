# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Environments with a state, for tests: one that plays `Replying`, and one whose sessions fail as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from replying import Replying

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem


class Session:
    """A `Replying` environment that keeps what was said, under the methods of an environment with a state."""

    def reset(self, problem: Problem, seed: int) -> str | None:
        self.problem, self.said = problem, list[str]()
        return None

    def step(self, response: str) -> Reply:
        self.said.append(response)
        reply = Replying().reply(self.problem, self.said)
        self.said.append(reply.text or "")
        return reply

    def close(self) -> None:
        pass


class Opened(Session):
    """A `Session` that shows a digit before the first response, which the seed decides."""

    def reset(self, problem: Problem, seed: int) -> str | None:
        super().reset(problem, seed)
        return str(random.Random(seed).randrange(10))


class Guiding(Session):
    """A `Session` whose replies have another hint for the teacher at each turn."""

    def step(self, response: str) -> Reply:
        reply = super().step(response)
        return replace(reply, hint=str(len(self.said) // 2))


class NeverWaited(Session):
    """A `Session` whose class leaves no status of a process that ends."""

    def __init__(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    def step(self, response: str) -> Reply:
        os._exit(3)


class Told:
    """An environment whose sessions do what the responses and the problem's answer say."""

    def __init__(self, directory: str = "") -> None:
        self.directory = directory
        self.steps = 0

    def reset(self, problem: Problem, seed: int) -> str | None:
        self.did(problem.answer or "")
        return f"{problem.answer} {seed}"

    async def step(self, response: str) -> Reply:
        await asyncio.sleep(0)
        self.steps += 1
        self.did(response)
        return "no reply" if response == "text" else Reply(f"#{self.steps}", done=response == "done")  # type: ignore[return-value]

    def close(self) -> None:
        if self.directory:
            with open(os.path.join(self.directory, f"closed{os.getpid()}"), "w") as file:
                file.write(str(self.steps))

    def did(self, word: str) -> None:
        if word == "raise":
            raise KeyError("no such tool")
        if word == "exit":
            sys.exit(0)
        if word == "die":
            os._exit(3)
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "stop":
            os.kill(os.getppid(), signal.SIGSTOP)
        if word == "half":
            raise ValueError("\ud83d")
        if word == "hang":
            subprocess.Popen(["sleep", "1000"])
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        if word == "memory":
            bytearray(10**9)
        if word == "nan":
            Reply(reward=float("nan"))
        if word == "print":
            print("said by a session")


def refusing() -> None:
    sys.exit("no licence")


def pid_of(group: int) -> list[int]:
    """Return the processes of a process group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(process.name))
    return found
