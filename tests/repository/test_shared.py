# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A shared directory is made once, by whichever process comes first, and again where making it has failed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import SharedDirectories


def test_of_all_that_ask_at_once_one_makes_the_directory(tmp_path):
    calls = []

    def make(directory):
        calls.append(directory)
        directory.mkdir()
        (directory / "file").write_text("whole")

    def ask(_):
        return (SharedDirectories(tmp_path).get("model", make) / "file").read_text()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == ["whole"] * 8
    assert calls == [tmp_path / "model"]


def test_a_directory_whose_making_failed_is_made_again(tmp_path):
    directories = SharedDirectories(tmp_path)
    with pytest.raises(ZeroDivisionError):
        directories.get("model", lambda directory: 1 / 0)
    assert directories.get("model", lambda directory: directory.mkdir()).is_dir()


def test_the_workers_of_a_run_have_one_root(shared, tmp_path_factory, request):
    directory = shared.get("root", lambda directory: directory.mkdir())
    worker = hasattr(request.config, "workerinput")
    assert directory.parent.parent == (
        tmp_path_factory.getbasetemp().parent if worker else tmp_path_factory.getbasetemp()
    )
