# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A dry run: what it refuses and prints, the microbatches and the idle time of a step, and the commands of a launch."""

from __future__ import annotations

import re
import shlex

import pytest
import tiny_run

from megatron_selfdistill.config import load
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.plan import plan_command as plan
from megatron_selfdistill.instruments.plan.dry_run import bubble, dry_run, in_flight, microbatches
from megatron_selfdistill.instruments.plan.plan_tables import launch_commands
from megatron_selfdistill.train import EXIT_BAD_INPUT, main

TINY = [
    *("cluster.num_gpus=16", "data.max_length=128", "rollout.max_new_tokens=64", "schedule.max_tokens=512"),
    *("model.vocab_size=1000", "model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4"),
]
SERVERS = ["rollout.engine=vllm", "rollout.placement=server", "rollout.server_python=/vllm/python"]


def test_a_dry_run_starts_no_process_group_writes_nothing_and_prints_what_plan_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "16 GPUs (2 nodes)" in printed and list(tmp_path.iterdir()) == []
    assert plan.main(TINY) == 0 and capsys.readouterr().out == printed
    monkeypatch.setenv("RANK", "0")
    assert plan.main(TINY) == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("parallel.tensor_model_parallel_size=3", "TP x PP x CP"),
        ("parallel.pipeline_model_parallel_size=8", "model.num_layers"),
        ("model.hidden_size=66 model.kv_channels=16 parallel.tensor_model_parallel_size=4", "model.hidden_size"),
        ("model.num_moe_experts=6 parallel.expert_model_parallel_size=4", "model.num_moe_experts"),
        ("data.global_batch_size=8", "data.global_batch_size"),
        ("rollout.max_new_tokens=128", "rollout.max_new_tokens"),
        ("cluster.num_gpus=12", "cluster.num_gpus"),
        ("model.provider=a.b", "model.provider"),
        ("rollout.engine=vllm rollout.engine_tp=8", "model.num_attention_heads"),
        (f"{' '.join(SERVERS)} rollout.num_servers=1 rollout.engine_tp=12", "multiple of 8"),
        ("rollout.engine=vllm model.normalization=LayerNorm model.activation=gelu", "Hugging Face"),
        ("model.transformer.mtp_num_layers=1", "multi-token-prediction"),
    ],
)
def test_what_cannot_run_is_refused_with_its_key(overrides, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        dry_run(load([*TINY, *overrides.split()]))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("schedule.max_tokens=65536", "activations"),
        (f"{' '.join(SERVERS)} rollout.num_servers=1 cluster.gpu_memory_gb=19", "rollout server would hold 15.3 GiB"),
        ("cluster.host_memory_gb=100", "optimizer in a save 91.6 + weights in a save 15.3 = 106.8 GiB"),
    ],
)
def test_the_first_part_that_does_not_fit_is_named(overrides, named):
    assert named in (dry_run(load(["recipe=qwen3_8b", *overrides.split()])).misfit() or "")


def test_data_that_is_named_is_read_and_counted(data, tmp_path, capsys):
    overrides = tiny_run.overrides(data, tmp_path / "run", "cluster.num_gpus=2", "dry_run=true")
    assert main(overrides) == 0
    out = capsys.readouterr().out
    assert "40 problems fit" in out and "adds 2 tokens of wording (data.teacher_template)" in out
    assert not any(f"{key}=/path" in out for key in ("data.path", "data.tokenizer"))
    assert main([*overrides, "data.max_length=16"]) == EXIT_BAD_INPUT
    assert "problems.jsonl:1:" in capsys.readouterr().err


def test_a_plan_for_logs_has_no_sampler_no_responses_and_no_memory_for_either(capsys):
    logs = ["recipe=chat_logs", *TINY]
    long_responses = ["rollout.max_new_tokens=4096", "rollout.num_samples=8"]
    assert main([*logs, *long_responses, *SERVERS, "rollout.engine_tp=3", "rollout.num_servers=1", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert not any(words in out for words in ("KV cache", "while sampling", "vLLM", "rollout_nodes", "4096 tokens"))
    long = dry_run(load([*logs, *long_responses]))
    assert long.step.num_microbatches == dry_run(load(logs)).step.num_microbatches
    assert all(memory.rollout == {} and memory.peak == memory.training_peak > 0 for memory in long.memory)
    full, half = (
        dry_run(load([*logs, "schedule.pair_order=teacher_first", f"data.max_length={length}"])).memory[-1]
        for length in (128, 64)
    )
    assert full.training["teacher states"] == 2 * half.training["teacher states"] > 0, "replies may fill the contexts"


INTERLEAVED = "parallel.pipeline_model_parallel_size=4 parallel.virtual_pipeline_model_parallel_size=2"
CONTROLS, ALTERNATING = "target.control=other target.num_controls=2", "schedule.pair_order=alternating"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", (3, 3)),
        (INTERLEAVED, (3, 6)),  # the reference reads the student's 3 once more
        (f"{INTERLEAVED} {ALTERNATING}", (4, 4)),
        ("method.name=sft", (3, 0)),
        (CONTROLS, (3, 9)),  # the teacher reads each response after three hints
        (f"{CONTROLS} {INTERLEAVED} {ALTERNATING}", (4, 12)),
        (f"{INTERLEAVED} target.anchor=student", (5, 3)),
        (f"{INTERLEAVED} target.anchor=student {ALTERNATING}", (4, 4)),
    ],
)
def test_microbatches_are_those_of_the_longest_contexts_raised_to_what_interleaving_takes(overrides, expected):
    assert microbatches(load(overrides.split()), 10, 4) == expected


def test_one_node_is_launched_alone_and_several_meet_at_the_head():
    _, one = launch_commands(load(["cluster.num_gpus=4"]), ["a=b"])
    assert one.startswith("torchrun --standalone --nproc-per-node 4 -m ")
    _, two = launch_commands(load(["cluster.num_gpus=16"]), ["x=[1, 2]", "dry_run=true"])
    assert '--nnodes 2 --node-rank "$NODE_RANK" --master-addr "$HEAD" --nproc-per-node 8' in two
    assert "'x=[1, 2]'" in two and "dry_run" not in two


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        (["cluster.num_gpus=8"], "sbatch examples/slurm/one_node.sbatch"),
        (["cluster.num_gpus=16"], "sbatch --nodes=2 examples/slurm/many_nodes.sbatch"),
        (
            ["recipe=llama31_405b_lora"],
            "HF_CONFIG=/path/to/hf/config SERVER_PYTHON=python SERVER_GPUS=16 SERVER_ARGS='--adapter-rank=32 "
            "--adapter-modules=down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj' SERVER_NODES=2 ROLLOUT_NODES=2 "
            "sbatch --nodes=4 examples/slurm/rollout_nodes.sbatch",
        ),
    ],
)
def test_slurm_gets_the_script_for_the_nodes_and_servers_of_the_plan(overrides, command):
    sbatch, _ = launch_commands(load([*overrides, "run_dir=my runs/first"]), ["run_dir=my runs/first", "a=b"])
    assert sbatch.startswith(f"RUN_DIR='my runs/first' {command} a=b checkpoint.load=") and "run_dir=" not in sbatch
    script = (tiny_run.REPOSITORY / shlex.split(command)[-1]).read_text()
    for variable in (word.partition("=")[0] for word in shlex.split(sbatch.split(" sbatch ")[0])):
        assert f"\n{variable}=${{{variable}:" in script, "a parameter of the script"


def test_servers_that_slurm_starts_are_not_started_by_the_run_too():
    servers = [*SERVERS, "rollout.num_servers=3"]
    sbatch, _ = launch_commands(load([*servers, "cluster.num_gpus=8"]), servers)
    overrides = shlex.split(sbatch.partition("rollout_nodes.sbatch")[2])
    rollout = load([*overrides, "rollout.servers=[http://node7:8000]"]).rollout
    assert rollout.num_servers == 0 and rollout.servers == ["http://node7:8000"]


# Stages, pairs and the time of teacher_first, from another simulator of Megatron's order.
@pytest.mark.parametrize(("pp_size", "pairs", "time"), [(4, 8, 41), (4, 128, 521), (8, 64, 277), (16, 16, 109)])
def test_teacher_first_waits_for_one_fill_and_one_drain(pp_size, pairs, time):
    assert bubble(pairs, pairs, pp_size, 1, 2.0) == pytest.approx((time - 4 * pairs) / time)
    interleaved = bubble(pairs, pairs, pp_size, 2, 2.0)
    assert interleaved == pytest.approx((time - 4 * pairs) / (time + 4 * pairs)), "half of the wait"
    assert bubble(pairs, pairs, 1, 1, 2.0) == 0, "one stage never waits"


@pytest.mark.parametrize(
    ("num_student", "pair", "num_chunks", "held"),
    [
        (16, 1, 1, (4, 3, 2, 1)),
        (2, 1, 1, (2, 2, 2, 1)),  # no more than there are
        (16, 2, 1, (2, 2, 1, 1)),  # half of what alternating holds are teachers, which hold nothing
        (16, 1, 2, (11, 9, 7, 5)),  # what the longer warm-up of the interleaved schedule forwarded
    ],
)
def test_an_earlier_stage_holds_more_microbatches_than_the_next(num_student, pair, num_chunks, held):
    assert tuple(in_flight(num_student, pair, 4, stage, num_chunks) for stage in range(4)) == held
