# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compile the loss's Triton kernels without a GPU and print the properties of the machine code, as a Markdown table.

    python tools/benchmarks/kernel_report.py [--arch 80 90 100] [--kernel NAME ...] [--third] [--json FILE]

Every kernel is compiled as runs use it, with ptxas, for each architecture (80: A100, 90: H100 and H200, 100: B200).
The script exits with 1 where a kernel spills registers.  Rows of logits begin on 16-byte boundaries here, like rows
whose length is a multiple of 16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from load_distance import load_distance

ARCHITECTURES = (80, 90, 100)


def main() -> int:
    """Compile the kernels for the chosen GPU and print their registers, spills and loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", help="only these, by the names in the first column; * is any text")
    parser.add_argument("--third", action="store_true", help="each kernel for one of the architectures, in turn")
    parser.add_argument("--json", type=Path, help="also write the table as JSON to this file")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if any(fnmatchcase(case.name, name) for name in arguments.kernel or ["*"])]
    pairs = list(itertools.product(chosen, arguments.arch))
    if arguments.third:
        pairs = [(case, arguments.arch[i % len(arguments.arch)]) for i, case in enumerate(chosen)]
    reports = [measure(case, arch) for case, arch in pairs]
    print(table(reports))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 1 if any(report.spills for report in reports) else 0


@dataclass(frozen=True)
class Case:
    """A kernel as runs use it: the types of its arguments by name, the values of its constants, its options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The measurements of one compiled kernel.

    registers: per thread; spills, shared: bytes.
    wide_loads, wide_stores: instructions of 16 bytes, as for logits (a row's last block, which a mask cuts, takes
    narrow ones); barriers: instructions.
    ahead: the instructions between a load of logits in a loop and the first instruction that needs it, on the shortest
    path; None without a loop over logits.
    """

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    barriers: int
    ahead: int | None


def cases() -> Iterator[Case]:
    """Yield every kernel, for bfloat16 and float32 logits, with the grids of 5, 9 and 1 betas."""
    import torch

    from megatron_selfdistill.choices import DIVERGENCES
    from megatron_selfdistill.kernels import contrast_kernels, pass_kernels, pass_launches
    from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid
    from megatron_selfdistill.loss.target import Target

    reading = {**pass_launches.COMPILED, "num_warps": 1}
    targets = Target(anchor="student"), Target(k_max=None, anchor="student"), Target("teacher_alone", anchor="student")
    for dtype, vec in (("bf16", 8), ("fp32", 4)):
        logits = dict.fromkeys(("student", "teacher", "out"), f"*{dtype}")
        summing = {"MIX": pass_kernels.BOTH, "LANES": pass_launches.LANES, "VEC": vec, "PACKED": True}
        first = pass_kernels.first_pass_kernel
        tokens = {"tokens": "*i64", "argmaxes": "*i32", "first_column": "i32"}
        for target in targets:
            grid = BetaGrid.of(target, torch.float32)
            doubled = sum(1 << j for j in grid.doubled)
            constants = {**summing, "J": len(grid.betas), "DOUBLED": doubled, "HAS_TOKENS": True}
            options = pass_launches.first_pass_options(grid, vec)
            constants |= {name: options.pop(name) for name in ("LANES", "VEC")}
            yield Case(f"first pass, {len(grid.betas)} betas, {dtype}", first, logits | tokens, constants, options)
        for some_rows, forward in itertools.product((False, True), repeat=2):
            name = f"{'third' if some_rows else 'second'} pass{', forward KL' if forward else ''}, {dtype}"
            constants = {**summing, "WITH_FORWARD": forward, "SOME_ROWS": some_rows}
            types = logits | {"argmaxes": "*i32", "statuses": "*i64" if some_rows else "*i32"}
            yield Case(name, pass_kernels.second_pass_kernel, types, constants, reading)
        yield Case(f"JSD pass, {dtype}", pass_kernels.jsd_pass_kernel, logits, summing, reading)
        renyi = {**summing, "FORWARD": False}
        yield Case(f"Renyi pass, {dtype}", pass_kernels.renyi_pass_kernel, logits, renyi, reading)
        gradient, options = pass_kernels.gradient_kernel, reading | {"num_warps": pass_launches.GRADIENT_WARPS}
        kinds = [(kind, i, False) for i, kind in enumerate((*DIVERGENCES, "Renyi"))] + [("both KL", 0, True)]
        for (title, kind, forward), log_prob in itertools.product(kinds, (False, True)):
            constants = {
                "MIX": pass_kernels.BOTH,
                "KIND": kind,
                "BLOCK": pass_launches.GRADIENT_BLOCK,
            }
            constants |= {"WITH_LOG_PROB": log_prob, "WITH_FORWARD": forward}
            types = logits | {"token_columns": "*i64" if log_prob else "*fp32"}
            name = f"gradient, {title}{', two terms' if log_prob else ''}, {dtype}"
            yield Case(name, gradient, types, constants, options)
        one, options = {"logits": f"*{dtype}"}, reading | {"num_warps": contrast_kernels.WARPS}
        block = {"BLOCK": contrast_kernels.BLOCK}
        yield Case(f"row log sums, {dtype}", contrast_kernels.row_log_sums_kernel, one, block, options)
        types = {"teacher": f"*{dtype}", "controls": f"*{dtype}", "out": "*fp32"}
        yield Case(f"contrast, {dtype}", contrast_kernels.contrast_kernel, types, block, options)
    yield from solving_cases()


def solving_cases() -> Iterator[Case]:
    """Yield the kernels between and after the passes, for whole rows and for rows in as many parts as ranks have."""
    from megatron_selfdistill.kernels import pass_kernels, solver_launches, statistics_kernels
    from megatron_selfdistill.loss.sharded.shard_sums import SECOND_PASS, SECOND_PASS_FORWARD

    double = dict.fromkeys(("state", "shifts", "exact"), "*fp64")
    double |= {"tokens": "*i64", "statuses": "*i64", "agreements": "*u8"}
    for parts in (1, 8, 64, 128):
        options = solver_launches.launch_options(parts)
        sizes = {name: options.pop(name) for name in ("ROWS", "PARTS")}
        sizes |= {"MIX": pass_kernels.BOTH, "GIVEN": False}
        for num_betas, favoured in ((5, 0), (9, 4)):
            constants = {"J": num_betas, "NUM_GRID": num_betas, "FAVOURED": favoured}
            name = f"solve, {num_betas} betas, {parts} parts"
            yield Case(name, statistics_kernels.solve_kernel, double, sizes | constants, options)
        for columns, some_rows in itertools.product((SECOND_PASS, SECOND_PASS_FORWARD), (False, True)):
            constants = {"NUM_GRID": 5, "LOWEST_IS_BOUND": True, "HAS_TOKENS": True, "NUM_COLUMNS": len(columns)}
            constants |= {"SOME_ROWS": some_rows}
            kind = f"{', forward KL' if columns is SECOND_PASS_FORWARD else ''}{', third pass' if some_rows else ''}"
            yield Case(
                f"finish{kind}, {parts} parts", statistics_kernels.finish_kernel, double, sizes | constants, options
            )


def measure(case: Case, arch: int) -> Report:
    """Return the report of a kernel compiled for an NVIDIA GPU; ``arch`` is its compute capability times 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else _type(name, case.types) for name in names}
    # As the launcher finds them: pointers and row strides are multiples of 16.
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    registers, spills = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    wide = r"\.(?:L\S+\.)?v(?:4\.b32|2\.b64)"
    return Report(
        name=case.name,
        arch=arch,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(rf"ld\.global{wide}", ptx)),
        wide_stores=len(re.findall(rf"st\.global{wide}", ptx)),
        barriers=len(re.findall(r"bar(?:rier)?\.(?:cta\.)?(?:red\.\S*\.)?sync|barrier0", ptx)),
        ahead=load_distance(_cuobjdump("-sass", compiled.asm["cubin"]))
        if "student_stride" in names and "out" not in names
        else None,
    )


def _type(name: str, types: dict[str, str]) -> str:
    if name in types:
        return types[name]
    if name in ("mix_weight", "jsd_lambda", "teacher_power", "rest_of_order", "renyi_factor", "log_number"):
        return "fp32"
    return "i32" if name.endswith("_stride") or name.startswith(("num_", "blocks_", "vocab_")) else "*fp32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers per thread, and the bytes of local memory and stack, which hold the rest of the values."""
    text = _cuobjdump("-res-usage", cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def table(reports: list[Report]) -> str:
    """Return a Markdown table with one row per kernel and architecture."""
    lines = [
        "| kernel | sm | registers | spilled bytes | shared bytes | 16-byte loads | 16-byte stores | barriers "
        "| instructions ahead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        ahead = "-" if r.ahead is None else r.ahead
        numbers = (r.arch, r.registers, r.spills, r.shared, r.wide_loads, r.wide_stores, r.barriers, ahead)
        lines.append(f"| {r.name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
