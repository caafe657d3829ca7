# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A shared folder is made once, by whichever process comes first, and again where making it has failed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import SharedFolders


def test_of_all_that_ask_at_once_one_makes_the_folder(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        folder.mkdir()
        (folder / "file").write_text("whole")

    def ask(_):
        return (SharedFolders(tmp_path).get("model", make) / "file").read_text()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == ["whole"] * 8
    assert calls == [tmp_path / "model"]


def test_a_folder_whose_making_failed_is_made_again(tmp_path):
    folders = SharedFolders(tmp_path)
    with pytest.raises(ZeroDivisionError):
        folders.get("model", lambda folder: 1 / 0)
    assert folders.get("model", lambda folder: folder.mkdir()).is_dir()


def test_the_workers_of_a_run_have_one_root(shared, tmp_path_factory, request):
    folder = shared.get("root", lambda folder: folder.mkdir())
    worker = hasattr(request.config, "workerinput")
    assert folder.parent.parent == (tmp_path_factory.getbasetemp().parent if worker else tmp_path_factory.getbasetemp())
