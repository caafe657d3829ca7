# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`make lock` writes the versions of one environment, and keeps the versions for other Pythons."""

from __future__ import annotations

import sys

from tiny_run import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import lock

LOCK = """# The versions.
[project]
absl-py==2.5.1
megatron-core==0.16.1; python_version < "3.12"
megatron-core==0.19.2; python_version >= "3.12"
torch==2.13.0
typing_extensions==4.16.0
wandb==0.31.0; platform_system == "Linux"
[vllm]
megatron-core==0.16.1; python_version < "3.12"
"""
FROZEN = ["absl-py==2.6.0", "megatron-core==0.18.0", "new-one==1.0", "nvidia-nccl-cu13==2.30", "torch==2.13.1+cpu"]


def versions(python: str, frozen: list[str], text: str = LOCK) -> list[str]:
    return lock.locked(text, frozen, {"python_version": python}).splitlines()


def test_the_line_of_this_python_gets_the_new_version_and_that_of_the_others_stays():
    before = versions("3.11", FROZEN)
    assert before == [
        "# The versions.",
        "[project]",
        "absl-py==2.6.0",
        'megatron-core==0.18.0; python_version < "3.12"',
        'megatron-core==0.19.2; python_version >= "3.12"',
        "new-one==1.0",
        "torch==2.13.1",
        "[vllm]",
        'megatron-core==0.16.1; python_version < "3.12"',
    ]
    after = versions("3.13", FROZEN)
    assert after[3:5] == [before[3].replace("18.0", "16.1"), before[4].replace("19.2", "18.0")]


def test_any_marker_is_kept_with_the_new_version_and_goes_with_its_package():
    found = versions("3.11", ["megatron_core==0.16.2", "wandb==0.32.0"])
    assert 'wandb==0.32.0; platform_system == "Linux"' in found
    assert "absl-py==2.5.1" not in found
    assert not [line for line in versions("3.11", FROZEN) if line.startswith("wandb")]
    assert 'megatron_core==0.16.2; python_version < "3.12"' in found  # the name is the same one


def test_the_real_lock_stays_as_it_is_with_the_versions_that_it_has():
    text = lock.LOCK.read_text(encoding="utf-8")
    section = text.partition("[project]\n")[2].partition("[vllm]\n")[0].splitlines()
    for python in ("3.11", "3.13"):
        lines = [lock.Requirement(line) for line in section]
        applying = [one for one in lines if one.marker is None or one.marker.evaluate({"python_version": python})]
        written = lock.locked(text, [f"{one.name}{one.specifier}" for one in applying], {"python_version": python})
        assert sorted(written.splitlines()) == sorted(text.splitlines())
