# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Programs that run in forks of one Python process, which has imported what all of them import.

    with ForkedPrograms(sys.executable, ["yaml"], os.environ) as programs:
        done = programs.run("tools/convert.py", "--help", cwd=directory)      # a file, or else the name of a module
        assert done.status == 0 and "torch" not in done.modules

A fork starts in milliseconds, where a process of its own would import for seconds.  The process imports nothing of
pytest's process, so that it tells which modules a program imports, and it may be that of another environment.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A fork has the streams, directory and arguments of a program of its own, and becomes its main module.
_SERVER = """
import importlib, json, os, runpy, signal, sys, traceback

def run(program, arguments):
    sys.argv = [program, *arguments]
    try:
        if os.path.isabs(program):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    program, arguments, cwd, directory, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        os.chdir(cwd)
        status = run(program, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        with open(f"{directory}/end", "w") as file:
            json.dump([status, sorted(sys.modules)], file)
        os._exit(0)
    os.waitpid(child, 0)
    print(child, file=answers, flush=True)
"""


@dataclass(frozen=True)
class Done:
    status: int
    """1 after an uncaught exception, whose traceback is on standard error."""
    modules: frozenset[str]
    """All modules that were imported then."""
    stdout: str
    stderr: str


class ForkedPrograms:
    """A process of the interpreter ``python``, with the modules ``preloaded`` in ``environment``."""

    def __init__(self, python: str | Path, preloaded: Sequence[str], environment: Mapping[str, str]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="selfdistill_programs_")
        command = [str(python), "-c", _SERVER, json.dumps(list(preloaded))]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(command, cwd=self._directory.name, env=environment, **streams)

    def run(self, program: str | Path, *arguments: str, cwd: Path, seconds: int = 300) -> Done:
        """Run a program in the directory ``cwd``; a signal ends it after ``seconds``, which is an error here."""
        assert self._server.stdin is not None and self._server.stdout is not None
        directory = Path(self._directory.name)
        for name in ("stdout", "stderr", "end"):
            (directory / name).unlink(missing_ok=True)
        request = [str(program), [str(argument) for argument in arguments], str(cwd), str(directory), seconds]
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answered = self._server.stdout.readline()
        output, error = ((directory / name).read_text() if answered else "" for name in ("stdout", "stderr"))
        if not (directory / "end").exists():
            raise AssertionError(f"{program} did not come to its end:\n{output}{error}")
        status, modules = json.loads((directory / "end").read_text())
        return Done(status, frozenset(modules), output, error)

    def __enter__(self) -> ForkedPrograms:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # it ends with its requests
        self._directory.cleanup()
