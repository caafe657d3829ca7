# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Nothing in the package unpickles or runs what a file brought, except through the restricted unpickler."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[4]
ROOTS = [REPOSITORY / name for name in ("megatron_selfdistill", "tools", "examples", "experiments")]
SOURCES = sorted(path for root in ROOTS for path in root.rglob("*.py") if "site-packages" not in path.parts)

STRATEGY = "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy"
UNSAFE = {STRATEGY} | set(
    "eval exec pickle.load pickle.loads pickle.Unpickler pickle._Unpickler _pickle.load _pickle.loads cPickle.load "
    "cloudpickle.load cloudpickle.loads dill.load dill.loads joblib.load shelve.open marshal.load marshal.loads "
    "pandas.read_pickle numpy.load numpy.fromfile yaml.load yaml.load_all yaml.full_load yaml.unsafe_load torch.load "
    "torch.jit.load torch.hub.load torch.package.PackageImporter torch.distributed.checkpoint.load "
    "torch.distributed.checkpoint.load_state_dict".split()
)
UNSAFE |= {
    f"megatron.core.dist_checkpointing.load{what}"
    for what in " _common_state_dict _content_metadata _plain_tensors _tensors_metadata _sharded_metadata".split(" ")
}
"""Calls; a name stands for itself and for what ends in it."""
ENDS = {name.rpartition(".")[2] for name in UNSAFE}
MAY_BE_UNSAFE = re.compile(r"shelve|\b(?:" + "|".join(ENDS - {"open"}) + r")\b")
MADE_SAFE_BY = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
"""Call -> the argument that makes it safe."""

ALLOWED = {
    ("checkpoint/formats/unpickler.py", "pickle._Unpickler"),  # the restricted unpickler is made of it
    ("distributed/parcels.py", "pickle.loads"),  # what a rank of this run sends, as with PyTorch's object collectives
    ("checkpoint/sharded_io.py", STRATEGY),  # with PyTorch's readers restricted
}
"""The uses that may stay, by file and call."""


def aliases(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Local name -> what it was imported as."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                found[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                found[name.asname or name.name] = f"{node.module}.{name.name}"
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """``np.load`` -> ``numpy.load``; None for what is no dotted name that ends like an unsafe one."""
    parts: list[str] = []
    if isinstance(node, ast.Attribute) and node.attr not in ENDS:
        return None
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([names.get(node.id, node.id), *reversed(parts)]) if isinstance(node, ast.Name) else None


def unsafe_uses(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of every unsafe function that ``source`` calls, hands on or inherits from."""
    nodes = list(ast.walk(ast.parse(source if MAY_BE_UNSAFE.search(source) else "")))
    names, safe_calls = aliases(nodes), set()
    for node in nodes:
        name = dotted(node.func, names) if isinstance(node, ast.Call) else None
        if name in MADE_SAFE_BY:
            argument, safe = MADE_SAFE_BY[name]
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            value = given.get(argument)
            says_so = isinstance(value, ast.Constant) and value.value is safe
            if says_so or (value is None and name == "numpy.load" and None not in given):  # safe by default
                safe_calls.add(id(node.func))
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in safe_calls:
            name = dotted(node, names)
            if name in UNSAFE and not (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)):
                yield node.lineno, name


def test_no_file_unpickles_and_every_exception_is_in_use():
    found = {}
    for path in SOURCES:
        here = path.relative_to(REPOSITORY).as_posix().removeprefix("megatron_selfdistill/")
        found |= {(here, name): line for line, name in unsafe_uses(path.read_text())}
    wrong = [f"{here}:{line} uses {name}" for (here, name), line in found.items() if (here, name) not in ALLOWED]
    assert not wrong, "read it with checkpoint.formats.unpickler, or as JSON"
    assert found.keys() >= ALLOWED


FOUND = {
    "from pickle import loads as read\nmap(read, data)": 1,
    "from pickle import Unpickler\nclass U(Unpickler): pass": 1,
    "import torch\ntorch.load(f, weights_only=False)": 1,
    "def f():\n    from torch import load\n    return load": 1,
    "import numpy as np\nnp.load(f, **options)": 1,
    "import yaml\nyaml.load(f, Loader=yaml.UnsafeLoader)": 1,
    "from megatron.core import dist_checkpointing\ndist_checkpointing.load(s, f)": 1,
    "eval(text)": 1,
    "import torch\ntorch.load(f, weights_only=True)": 0,
    "import numpy as np\nnp.load(f)": 0,
    "import yaml\nyaml.safe_load(f)\nmodel.eval()": 0,
}


def test_unsafe_uses_are_found_and_safe_ones_pass():
    for source, number in FOUND.items():
        assert len(list(unsafe_uses(source))) == number, source
