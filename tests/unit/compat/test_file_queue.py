# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The queue in which the writers of a checkpoint return their results on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import queue

import pytest
import torch

from megatron_selfdistill.compat.cpu import FileQueue  # isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.strategies import filesystem_async

FORK = multiprocessing.get_context("fork")


def put_from_a_fork(results, value):
    writer = FORK.Process(target=results.put, args=(value,))
    writer.start()
    writer.join(30)
    assert writer.exitcode == 0


def test_objects_of_any_size_from_forks_and_from_the_process_itself_come_out_in_order():
    results = FileQueue()
    put_from_a_fork(results, {0: ["a" * (1 << 21)]})  # a pipe holds 64 KiB
    results.put({})
    put_from_a_fork(results, OSError("the disk is on fire"))
    assert results.get_nowait() == {0: ["a" * (1 << 21)]}
    assert results.get_nowait() == {}
    error = results.get_nowait()
    assert isinstance(error, OSError) and str(error) == "the disk is on fire"
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.mark.parametrize("missing", [1, 20])
def test_an_incomplete_object_of_a_killed_writer_is_not_there(missing):
    results = FileQueue()
    results.put("complete")
    start = os.fstat(results._writer.fileno()).st_size
    results.put("incomplete")
    length = os.fstat(results._writer.fileno()).st_size - missing
    assert length > start
    os.ftruncate(results._writer.fileno(), length)
    os.lseek(results._writer.fileno(), length, os.SEEK_SET)
    assert results.get_nowait() == "complete"
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put("the next save")
    assert results.get_nowait() == "the next save"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA Megatron's own queue stays")
def test_megatrons_queue_of_write_results_starts_no_process(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    before = multiprocessing.active_children()
    results = filesystem_async.get_write_results_queue()
    assert isinstance(results, FileQueue)
    assert filesystem_async.get_write_results_queue() is results
    assert multiprocessing.active_children() == before
