# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Nothing in the package unpickles or runs what a file brought, except through the restricted unpickler."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
SOURCES = sorted(
    path
    for directory in ("megatron_selfdistill", "tools", "examples", "experiments")
    for path in (REPOSITORY / directory).rglob("*.py")
    if "site-packages" not in path.parts
)

STRATEGY = "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy"
# Call -> the argument that makes it safe, where there is one.  A name stands for itself and for what ends in it.
UNSAFE: dict[str, tuple[str, object] | None] = {
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "pickle._Unpickler": None,
    "_pickle.load": None,
    "_pickle.loads": None,
    "cPickle.load": None,
    "cloudpickle.load": None,
    "cloudpickle.loads": None,
    "dill.load": None,
    "dill.loads": None,
    "joblib.load": None,
    "shelve.open": None,
    "marshal.load": None,
    "marshal.loads": None,
    "pandas.read_pickle": None,
    "torch.load": ("weights_only", True),
    "torch.jit.load": None,
    "torch.hub.load": None,
    "torch.package.PackageImporter": None,
    "numpy.load": ("allow_pickle", False),
    "numpy.fromfile": None,
    "yaml.load": None,
    "yaml.load_all": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "torch.distributed.checkpoint.load": None,
    "torch.distributed.checkpoint.load_state_dict": None,
    "megatron.core.dist_checkpointing.load": None,
    "megatron.core.dist_checkpointing.load_common_state_dict": None,
    "megatron.core.dist_checkpointing.load_content_metadata": None,
    "megatron.core.dist_checkpointing.load_plain_tensors": None,
    "megatron.core.dist_checkpointing.load_tensors_metadata": None,
    "megatron.core.dist_checkpointing.load_sharded_metadata": None,
    STRATEGY: None,
    "eval": None,
    "exec": None,
}
# These are safe without an argument, and unsafe with one.
SAFE_BY_DEFAULT = {"numpy.load"}

# (file, call) -> why it may stay.
ALLOWED = {
    ("checkpoint/formats/unpickler.py", "pickle._Unpickler"): "the restricted unpickler is made of it",
    ("distributed/parcels.py", "pickle.loads"): "what a rank of this run sends, as with PyTorch's object collectives",
    ("checkpoint/sharded_io.py", STRATEGY): "with PyTorch's readers restricted",
}


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
    """``np.load`` -> ``numpy.load``; None for what is no dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else None
    return None


def unsafe_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every unsafe function that ``source`` calls, hands on or inherits from."""
    nodes = list(ast.walk(ast.parse(source)))
    names = aliases(nodes)
    safe_calls = set()
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        safe = UNSAFE.get(name or "")
        if safe is not None:
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            value = given.get(safe[0])
            says_so = isinstance(value, ast.Constant) and value.value is safe[1]
            if says_so or (value is None and name in SAFE_BY_DEFAULT and None not in given):
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
    assert set(ALLOWED) <= set(found)


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import loads as read\nmap(read, data)",
        "from pickle import Unpickler\nclass U(Unpickler): pass",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "def f():\n    from torch import load\n    return load",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, **options)",
        "import yaml\nyaml.load(f, Loader=yaml.UnsafeLoader)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(s)",
        "from megatron.core import dist_checkpointing\ndist_checkpointing.load(s, f)",
        "eval(text)",
    ],
)
def test_an_unsafe_use_is_found(source):
    assert len(list(unsafe_uses(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.dumps(x)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)",
        "import yaml\nyaml.safe_load(f)",
        "model.eval()",
    ],
)
def test_a_safe_use_passes(source):
    assert list(unsafe_uses(source)) == []
