# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The workers of a session compile each file once: each begins with a part of its own, and finds what others cached."""

from __future__ import annotations

import sys

import bytecode
import pytest
from _pytest.assertion import rewrite
from _pytest.pathlib import import_path


@pytest.mark.parametrize(("files", "workers"), [(10, 3), (2, 3), (0, 2), (7, 1)])
def test_every_worker_has_all_files_and_begins_with_a_part_of_its_own(files, workers):
    orders = [bytecode.own_first(range(files), number, workers) for number in range(workers)]
    assert all(sorted(order) == list(range(files)) for order in orders)
    sizes = [files * (number + 1) // workers - files * number // workers for number in range(workers)]
    own = [file for order, size in zip(orders, sizes, strict=True) for file in order[:size]]
    assert sorted(own) == list(range(files))


def test_a_worker_in_the_place_of_one_that_has_died_has_all_files_too():
    assert sorted(bytecode.own_first(range(10), 5, 3)) == list(range(10))


def test_pytest_imports_the_cached_file_and_a_changed_file_is_rewritten(request, tmp_path, monkeypatch):
    file = tmp_path / "test_cached_bytecode.py"
    for expected in (2, 33):  # another size is another file
        file.write_text(f"def test_sum():\n    assert 1 + 0 == {expected}\n")
        bytecode.cache_rewritten(file, request.config)
        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "_rewrite_test", lambda *_: pytest.fail("the file was rewritten again"))
            bytecode.cache_rewritten(file, request.config)
            module = import_path(file, mode="importlib", root=tmp_path, consider_namespace_packages=False)
        with pytest.raises(AssertionError, match=rf"assert \(1 \+ 0\) == {expected}"):
            module.test_sum()
        monkeypatch.delitem(sys.modules, module.__name__)
