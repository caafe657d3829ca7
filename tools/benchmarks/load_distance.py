# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The distance that a kernel reads ahead: the instructions between a load in a loop and its first use.

A warp continues after a load and stops at the first instruction that reads the result.  Comments in a kernel cannot
promise how much work lies between the two, because the compiler may move both.  This file measures it in the machine
code.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WIDE_LOAD = re.compile(r"LDG\.E\.(?:\w+\.)*(?:64|128)\b")
_NO_RESULT = ("ST", "RED", "BRA", "BREAK", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "BAR", "NOP", "MEMBAR")


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS, as cuobjdump prints it.

    written, read: numbers of 32-bit registers; following: indices of the instructions that may come next.
    """

    text: str
    conditional: bool
    written: frozenset[int]
    read: frozenset[int]
    following: tuple[int, ...]


def load_distance(sass: str) -> int | None:
    """Return the least number of instructions between a load within a loop and the first use of its result.

    All paths count, and only loads of 8 or 16 bytes; the result is None without such a load.
    """
    code = instructions(sass)
    loads = [i for i, instruction in enumerate(code) if _WIDE_LOAD.match(instruction.text)]
    distances = [_distance(code, i) for i in loads if _is_in_a_loop(code, i)]
    return min((distance for distance in distances if distance is not None), default=None)


def instructions(sass: str) -> list[Instruction]:
    """Return the instructions of a kernel in SASS, the text of cuobjdump."""
    lines = [match.groups() for match in map(_LINE.match, sass.splitlines()) if match]
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    return [_instruction(i, predicate, name, rest, index) for i, (_, predicate, name, rest) in enumerate(lines)]


def _instruction(i: int, predicate: str | None, name: str, rest: str, index: dict[int, int]) -> Instruction:
    written, read = _registers(name, rest)
    after = (i + 1,) if i + 1 < len(index) else ()
    if name.startswith(("EXIT", "RET")):
        after = after if predicate else ()
    elif name.startswith(("BRA", "UBRA", "BREAK")) and (target := re.findall(r"0x[0-9a-f]+", rest)):
        conditional = predicate or re.search(r"\bU?P\d", rest) or "DIV" in name
        after = (index[int(target[-1], 16)], *(after if conditional else ()))
    return Instruction(f"{name} {rest}", predicate is not None, written, read, after)


def _registers(name: str, rest: str) -> tuple[frozenset[int], frozenset[int]]:
    """Return the registers (written, read) of an instruction.

    A wide result fills the registers that follow the named one.
    """
    operands = rest.split(",")
    if name.startswith(_NO_RESULT):
        return frozenset(), _numbers(rest)
    # a shuffle and a comparison may name predicates before the register they write
    place = 1 if re.match(r"U?P[T\d]", operands[0]) else 0
    result = _numbers(operands[place]) if len(operands) > place and "[" not in operands[place] else frozenset()
    if place and not name.startswith("SHFL"):
        result = frozenset()
    width = {"128": 4, "64": 2}.get(name.rsplit(".", 1)[-1], 1) if name.startswith("LD") else 1
    sources = ",".join(operands[place + 1 :] if result else operands)
    return frozenset(first + k for first in result for k in range(width)), _numbers(sources)


def _numbers(text: str) -> frozenset[int]:
    return frozenset(int(number) for number in re.findall(r"\bR(\d+)\b", text))


def _is_in_a_loop(code: list[Instruction], i: int) -> bool:
    seen: set[int] = set()
    waiting = list(code[i].following)
    while waiting:
        j = waiting.pop()
        if j not in seen:
            seen.add(j)
            waiting += code[j].following
    return i in seen


def _distance(code: list[Instruction], i: int) -> int | None:
    """Return the distance to the first use of the loaded registers, searched breadth first."""
    waiting = deque((j, code[i].written, 0) for j in code[i].following)
    seen: set[tuple[int, frozenset[int]]] = set()
    while waiting:
        j, held, between = waiting.popleft()
        if not held or (j, held) in seen:
            continue
        seen.add((j, held))
        if code[j].read & held:
            return between
        left = held if code[j].conditional else held - code[j].written
        waiting.extend((k, left, between + 1) for k in code[j].following)
    return None
