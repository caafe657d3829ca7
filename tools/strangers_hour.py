# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A stranger's hour: runs what README and the six numbered pages show, in a fresh clone with an empty environment.

    python tools/strangers_hour.py /tmp/hour                  clones this repository into the directory, and walks
    python tools/strangers_hour.py /tmp/hour --pages README.md

The model of `make quickstart-real` takes the place of the published ones, responses are short and runs have few steps
(`SMALL`).  The table has the seconds and the lines of output of each command, and the warnings that it printed; what
needs GPUs, vLLM or a part that a page leaves out is listed without a time.  It ends with 1 if a command fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in "quickstart your_data first_run monitoring next_steps".split()))
MODEL = "runs/real_model/hf"
SMALL = {
    "Qwen/Qwen3-1.7B": MODEL,
    "rollout.max_new_tokens=2048": "rollout.max_new_tokens=24",
    "num_steps=200": "num_steps=2 data.global_batch_size=4 schedule.max_tokens=512 optimizer=fp32",
}
"""What a command names -> what takes its place here."""
NEEDS = {
    r"nproc-per-node 8|qwen3_8b|--ranks 8|wen3-8[bB]": "8 GPUs",
    r"\[vllm\]": "vLLM",
    r"(^|\s)\.\.\.|\(|<": "what the page leaves out",
    "make test": "make test: minutes to hours",
}


def commands(page: Path) -> Iterator[str]:
    """Yield the commands in the code blocks of a page, without comments."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if re.match(r"(selfdistill|torchrun|make|pip) ", line):
                yield re.sub(r"\s+#.*", "", line)


def write_inputs(directory: Path) -> None:
    """Write the problems that the pages' commands name."""
    for name, numbers in (("problems.jsonl", range(2, 10)), ("held_out.jsonl", range(12, 16))):
        records = [
            {"problem": f"What is {n} plus 5?", "solution": f"{n} + 5 = {n + 5}", "answer": str(n + 5)} for n in numbers
        ]
        (directory / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))


def run(command: str, clone: Path) -> tuple[int, float, str]:
    """Run a command in the clone; return its status, seconds and output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
    environment["PATH"] = os.pathsep.join([str(clone / ".venv" / "bin"), environment["PATH"]])
    began = time.monotonic()
    done = subprocess.run(command, shell=True, cwd=clone, env=environment, text=True, capture_output=True)
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Walk the pages; print the table; return 1 if a command has failed, and else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the new directory of the clone")
    parser.add_argument("--pages", nargs="+", default=PAGES, help=f"(default: {' '.join(PAGES)})")
    options = parser.parse_args(argv)
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(options.directory)], check=True)
    write_inputs(options.directory)
    seen, failed, total = set(), False, 0.0
    print("| page | command | seconds | lines | warnings |\n|---|---|---|---|---|", flush=True)
    for page in options.pages:
        for shown in commands(options.directory / page):
            command = re.sub("|".join(map(re.escape, SMALL)), lambda found: SMALL[found[0]], shown)
            needed = next((what for pattern, what in NEEDS.items() if re.search(pattern, shown)), None)
            if command in seen or needed:
                print(f"| {page} | `{shown}` | {f'needs {needed}' if needed else 'as above'} | | |", flush=True)
                continue
            seen.add(command)
            status, seconds, output = run(command, options.directory)
            total += seconds
            warnings = [line for line in output.splitlines() if re.search("(?i)warn", line)]
            print(
                f"| {page} | `{command}` | {seconds:.0f} | {len(output.splitlines())} | {len(warnings)} |", flush=True
            )
            for line in [*warnings, *([f"status {status}", *output.splitlines()[-5:]] if status else [])]:
                print(f"    {line[:200]}", file=sys.stderr, flush=True)
            failed = failed or status != 0
    print(f"\n{total / 60:.0f} minutes")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
