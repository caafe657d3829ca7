# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
# mypy: disable-error-code="assignment, misc"
"""The kernels' reading of logits: one block ahead of their sums, in the words of wide loads.

Twin: none; PyTorch reads and computes with its own operations.
A pass takes the numbers out of a block's words, starts to read the next block, then works.  Three rules let this order
survive compilation (``tools/benchmarks/kernel_report.py`` shows how many instructions lie between a load and its first
use):

- A block that is being read is held as words of 4 bytes.  Numbers of 16 bits would be unpacked at the load, which waits
  there.
- A load under a mask is one instruction.  In a branch, its result would be copied behind the branch, which waits too.
- The last block of a part, if it is incomplete, is read in a branch between the load of the next block and the work:
  ptxas moves loads towards their use, but not across a branch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetched(row, lane, start, end, VEC: tl.constexpr, PACKED: tl.constexpr):
    """Start to read a block of a row, VEC columns per lane; read nothing unless the whole block lies before ``end``.

    PACKED: rows begin on 16-byte boundaries.  Otherwise numbers of 16 bits are read one by one.
    """
    if PACKED:
        words, columns = _words(row + start, lane, VEC)
    else:
        words, columns = row + start, _columns(lane, VEC)
    whole = tl.zeros_like(columns) + (start + lane.shape[0] * VEC) <= end
    block = tl.load(words + columns, mask=whole)
    return block


@triton.jit
def numbers_of(block, row, lane, VEC: tl.constexpr, PACKED: tl.constexpr):
    """Return the block that `fetched` read as float32 [lanes, VEC]."""
    return _unpacked(block, row, lane, VEC) if PACKED else block.to(tl.float32)


@triton.jit
def with_end(numbers, row, lane, start, end, VEC: tl.constexpr):
    """Return the numbers of the block at ``start``; an incomplete block is read here, with -inf beyond ``end``."""
    if start + lane.shape[0] * VEC > end:
        columns = _columns(lane, VEC)
        numbers = tl.load(row + start + columns, mask=columns < end - start, other=float("-inf")).to(tl.float32)
    return numbers


@triton.jit
def _words(start, lane, VEC: tl.constexpr):
    """Return a pointer to words of 4 bytes, and the indices of the words of each lane."""
    if start.dtype.element_ty.is_fp32():
        words, columns = start, _columns(lane, VEC)
    else:
        words, columns = start.to(tl.pointer_type(tl.int32)), _columns(lane, VEC // 2)
    return words, columns


@triton.jit
def _unpacked(block, row, lane, VEC: tl.constexpr):
    """Return the float32 numbers in a block of words."""
    if row.dtype.element_ty.is_fp32():
        numbers = block
    else:
        if row.dtype.element_ty.is_bf16():
            even, odd = (block << 16).to(tl.float32, bitcast=True), (block & -65536).to(tl.float32, bitcast=True)
        else:
            even = block.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (block >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        numbers = tl.reshape(tl.join(even, odd), [lane.shape[0], VEC])
    return numbers


@triton.jit
def _columns(lane, VEC: tl.constexpr):
    """Return the columns of each lane within a block, [lanes, VEC]."""
    return lane[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load(row, offsets, start, end, BLOCK: tl.constexpr):
    """Return a block of a row, read at once, with -inf beyond ``end``.

    A whole block is read without a mask, which would split wide loads.
    """
    if start + BLOCK <= end:
        block = tl.load(row + start + offsets)
    else:
        block = tl.load(row + start + offsets, mask=offsets < end - start, other=float("-inf"))
    return block
