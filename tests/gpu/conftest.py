# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""All tests here have the mark ``gpu``, unless ``--device cpu`` runs them as far as a CPU can; see docs/support.md.

What computes on a device is in child processes (tests/support/children.py): a CUDA error or a hang ends its test alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hidden_gpus
import pytest
import tiny_run
from children import Ranks

TESTS = Path(__file__).resolve().parent
OF_A_CPU = {hidden_gpus.VARIABLE: "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cuda", "cpu"), help="cuda: an error without a GPU; default: skip the tests without one"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(number): needs so many NVIDIA GPUs")
    device = config.getoption("device", None)
    if device == "cpu":
        os.environ |= OF_A_CPU
    elif device == "cuda" and not hidden_gpus.number(os.environ.get(hidden_gpus.VARIABLE)):
        raise pytest.UsageError("expected an NVIDIA GPU and a torch with CUDA, found none; on a CPU use --device cpu")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are named: the processes of make test would share the GPU."""
    named = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return None if any(path.resolve().is_relative_to(TESTS) for path in named) else True


def pytest_report_header(config: pytest.Config) -> str:
    return hidden_gpus.described(config.getoption("device", None) != "cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS) and config.getoption("device", None) != "cpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    mark = request.node.get_closest_marker("gpus")
    if mark and hidden_gpus.number(os.environ.get(hidden_gpus.VARIABLE)) < mark.args[0]:
        pytest.skip(f"needs {mark.args[0]} GPUs")


@pytest.fixture(scope="session")
def on_gpu(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("device", None) != "cpu"


@pytest.fixture
def keeps(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that asserts the bounds of a figure, prints it, and adds it to the report of junit."""

    def check(name: str, value: float, at_most: float = math.inf, at_least: float = -math.inf) -> None:
        record_property(name, value)
        print(f"{name}: {value:.3g}, expected {at_least:g} to {at_most:g}")
        assert at_least <= value <= at_most, f"{name}: {value:.3g}, expected {at_least:g} to {at_most:g}"

    return check


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[..., Ranks]]:
    """Return a function that returns the `Ranks` of its arguments, which stay for the session."""
    made: dict[Any, Ranks] = {}
    yield lambda count, *without: made.setdefault((count, without), Ranks(count, without))
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def child(ranks_of: Callable[..., Ranks]) -> Callable[..., Any]:
    """Return a function that calls a function in one process, which sees the device."""
    return lambda function, *arguments: ranks_of(1, "transformer_engine").run(function, *arguments)[0]


@pytest.fixture(scope="session")
def reference() -> Iterator[Ranks]:
    """Return the process of one CPU rank, which sees no GPU."""
    ranks = Ranks(1, ["transformer_engine"], {hidden_gpus.VARIABLE: ""})
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    tiny_run.write_data(directory)
    return directory
