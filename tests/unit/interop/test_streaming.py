# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""torch_dist directories written a tensor at a time: nothing more is ever held, and any chunking reads back."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop import torch_dist_tensors
from megatron_selfdistill.interop.torch_dist_tensors import Piece, TorchDistReader


def cut(key: str, full: Tensor, sizes: tuple[int, ...]) -> list[Piece]:
    """Pieces of at most ``sizes`` that make up ``full``."""
    pieces = []
    starts = [range(0, n, size) for n, size in zip(full.shape, sizes, strict=True)]
    for offset in torch.cartesian_prod(*(torch.tensor(list(r)) for r in starts)).reshape(-1, full.dim()).tolist():
        part = full[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))]
        pieces.append(Piece(key, tuple(full.shape), tuple(offset), tuple(part.shape), full.dtype, part.clone))
    return pieces


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_slice_reads_back_whatever_the_chunks(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    sizes = tuple(data.draw(st.integers(1, n)) for n in shape)
    full = torch.arange(torch.Size(shape).numel()).reshape(shape).to(torch.float32)
    directory = tmp_path_factory.mktemp("chunks")
    torch_dist_tensors.write(directory, cut("key", full, sizes), {})
    source = TorchDistReader(directory)
    depth = data.draw(st.integers(0, len(shape) - 1))
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape[:depth])
    assert torch.equal(source.read_at(("key", index), ()), full[index])
    rows = data.draw(st.integers(1, shape[depth]))
    assert torch.equal(source.read_at(("key", index), (), rows), full[index][:rows])


def test_a_tensor_is_dropped_before_the_next_one_is_made(tmp_path):
    alive: list[weakref.ref] = []

    def make() -> Tensor:
        assert not [ref for ref in alive if ref() is not None]
        tensor = torch.ones(1, 8, 8)
        alive.append(weakref.ref(tensor))
        return tensor

    keys = [f"decoder.layers.{layer}.weight" for layer in range(5)]
    pieces = [Piece(key, (1, 8, 8), (0, 0, 0), (1, 8, 8), torch.float32, make) for key in keys]
    torch_dist_tensors.write(tmp_path, pieces, {})
    assert len(alive) == 5


def test_files_are_cut_and_summed_up_while_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_tensors, "MAX_FILE_BYTES", 3000)
    full = torch.randn(6, 16, 16)
    torch_dist_tensors.write(tmp_path, cut("key", full, (1, 16, 16)), {"iteration": 0})
    manifest.write(tmp_path)
    entries = manifest.read(tmp_path)
    assert entries is not None and len([name for name in entries if name.endswith(".distcp")]) > 2
    assert manifest.wrong_size(tmp_path, entries) is None and manifest.wrong_contents(tmp_path, entries) is None
    assert torch.equal(TorchDistReader(tmp_path).read_at(("key", ()), ()), full)


def test_tensors_that_are_not_covered_and_files_that_are_cut_off_are_named(tmp_path):
    torch_dist_tensors.write(tmp_path / "parts", cut("key", torch.zeros(4, 3), (2, 3))[:1], {})
    with pytest.raises(CheckpointError, match="holds only parts of key"):
        TorchDistReader(tmp_path / "parts").read_at(("key", ()), ())
    torch_dist_tensors.write(tmp_path / "cut", cut("key", torch.zeros(4, 300), (4, 300)), {})
    file = tmp_path / "cut" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"corrupt __0_0\.distcp: no tensor of key"):
        TorchDistReader(tmp_path / "cut").read_at(("key", ()), ())
