# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tests that CI runs of each suite with an environment of its own: ``make test-vllm SMOKE=1`` and the like.

A line is a file, a function, or one case of a function; the tests get the mark ``smoke``.
"""

from __future__ import annotations

import pytest

SMOKE = """
tests/browser/test_explorer_page.py::test_the_page_computes_the_target_of_whole_rows
tests/browser/test_report_shown.py::test_a_page_shows_text_that_is_no_markup_stops_code_and_the_network_and_shows_errors
tests/browser/test_report_shown.py::test_a_report_opens_with_a_curve_an_answer_before_and_after_and_whether_each_run_learns
tests/clusters/test_clusters.py::test_hadolint_finds_no_fault_in_the_containerfile
tests/clusters/test_clusters.py::test_kubernetes_knows_every_field_of_the_job
tests/clusters/test_clusters.py::test_ray_starts_the_run_of_torchrun
tests/environments/test_nemo_gym.py::test_ten_episodes_are_sessions_of_the_server
tests/environments/test_openenv.py::test_ten_episodes_are_sessions_of_the_server
tests/environments/test_reasoning_gym.py::test_the_problems_of_a_task_are_read_and_verified[word_sorting]
tests/environments/test_textworld.py::test_ten_episodes_are_won_by_their_walkthroughs
tests/environments/test_verifiers.py::test_ten_episodes_are_rollouts_that_the_rubric_rewards
tests/real_model/test_smollm2.py::test_the_tokenizer_takes_digits_alone_and_the_chat_ends_at_id_2
tests/real_model/test_smollm2.py::test_logits_are_those_of_transformers_on_the_file_in_any_layout[PP2]
tests/slurm/test_slurm.py::test_slurm_accepts
tests/slurm/test_slurm.py::test_a_run_on_one_node_completes_with_a_report_of_the_environment_first
tests/trainers/test_hf_trainer.py::test_all_weights_have_the_gradient_of_the_pipeline
tests/trainers/test_megatron_lm.py::test_the_loop_of_megatron_core_has_the_gradient_of_the_pipeline
tests/trainers/test_peers_step.py::test_every_contender_takes_every_part_of_a_step
tests/trainers/test_trl_trainer.py::test_the_gradient_is_that_of_the_pipeline
tests/verl/test_verl_losses.py
tests/vllm/colocated/test_memory_check.py
tests/vllm/colocated/test_run.py::test_every_step_trains_on_responses_of_its_own_weights[one rank]
tests/vllm/server/test_adapters_on_servers.py::test_an_update_sends_the_factors_alone_and_gives_the_trainers_tokens[layout1-1-gloo]
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests; with ``-m smoke``, raise `pytest.UsageError` if a line of a collected directory has no test."""
    lines = set(SMOKE.split("\n")) - {""}
    found = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        named = lines & {item.nodeid, function, function.partition("::")[0]}
        if named:
            item.add_marker("smoke")
            found |= named
    directories = {item.nodeid.rpartition("/")[0] for item in items}
    if config.option.markexpr == "smoke":
        lost = sorted(line for line in lines - found if line.partition("::")[0].rpartition("/")[0] in directories)
        if lost:
            raise pytest.UsageError(f"expected the tests of tests/support/smoke.py, found none for {', '.join(lost)}")
