# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The refusals of the dry run, whose messages name the key, and the launches that become a dry run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import tiny_run

from megatron_selfdistill.config import load
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.plan import plan_command as plan
from megatron_selfdistill.instruments.plan.dry_run import bubble, dry_run, in_flight, microbatches
from megatron_selfdistill.instruments.plan.memory import GIB
from megatron_selfdistill.instruments.plan.plan_tables import launch_commands
from megatron_selfdistill.train import EXIT_BAD_INPUT, main

REPOSITORY = Path(__file__).resolve().parents[4]
TINY = [
    "cluster.num_gpus=16",
    "model.vocab_size=1000",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "rollout.max_new_tokens=64",
    "data.max_length=128",
    "schedule.max_tokens=512",
]


def test_a_dry_run_starts_no_process_group_and_writes_nothing(tmp_path, capsys):
    assert main([*TINY, "dry_run=true", f"run_dir={tmp_path}/run"]) == 0
    assert "16 GPUs (2 nodes)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def printed() -> str:
    """Return what a dry run prints that names no run directory."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*TINY, "dry_run=true"]) == 0
    return out.getvalue()


def test_the_command_plan_prints_what_a_dry_run_prints(printed, capsys, monkeypatch):
    assert plan.main(TINY) == 0
    assert capsys.readouterr().out == printed
    monkeypatch.setenv("RANK", "0")
    assert plan.main(TINY) == EXIT_BAD_INPUT
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tensor_model_parallel_size=3"], "the world size 16 must be a multiple of TP x PP x CP = 3"),
        (["parallel.pipeline_model_parallel_size=8"], "model.num_layers (4) must be a multiple of PP x VPP (8)"),
        (["parallel.tensor_model_parallel_size=8"], "model.num_attention_heads (4)"),
        (
            ["model.hidden_size=66", "model.kv_channels=16", "parallel.tensor_model_parallel_size=4"],
            "model.hidden_size",
        ),
        (["model.num_moe_experts=6", "parallel.expert_model_parallel_size=4"], "model.num_moe_experts (6)"),
        (["data.global_batch_size=8"], "data.global_batch_size (8) must be at least the number of data-parallel ranks"),
        (["rollout.max_new_tokens=128"], "rollout.max_new_tokens (128) leaves no room for a prompt"),
        (["data.max_length=1024"], "data.max_length (1024) exceeds the longest packed sequence (512)"),
        (
            ["cluster.num_gpus=12"],
            "cluster.num_gpus (12) must be at most cluster.gpus_per_node (8) or a multiple of it",
        ),
        (["model.vocab_size=null"], "set model.vocab_size"),
        (["model.provider=a.b"], "model.provider=a.b builds a model that only a launch can see"),
        (["rollout.engine=vllm", "rollout.engine_tp=3"], "rollout.engine_tp=3 ranks form one engine"),
        (["rollout.engine=vllm", "rollout.engine_tp=8"], "must divide model.num_attention_heads (4)"),
        (
            "rollout.engine=vllm rollout.placement=server rollout.num_servers=1 rollout.engine_tp=12".split(),
            "at most 8, or all GPUs of several; choose a multiple of 8",
        ),
        (["rollout.engine=vllm", "model.normalization=LayerNorm", "model.activation=gelu"], "no known Hugging Face"),
        (["model.transformer.mtp_num_layers=1"], "multi-token-prediction layers are not trained"),
    ],
)
def test_what_cannot_run_is_refused_with_a_message_of_one_line(overrides, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as refusal:
        dry_run(load([*TINY, *overrides]))
    assert "\n" not in str(refusal.value)


SERVER = ["rollout.placement=server", "rollout.num_servers=1", "rollout.server_python=python"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["cluster.gpu_memory_gb=40", "schedule.pair_order=alternating"],
            "while sampling (KV cache 16.0 and engine weights 15.3)",
        ),
        (["schedule.max_tokens=65536"], "while training (activations"),
        ([*SERVER, "cluster.gpu_memory_gb=19"], "a GPU of a rollout server would hold 15.3 GiB of weights"),
        (
            ["cluster.host_memory_gb=100"],
            "the ranks of a node would hold optimizer in a save 91.6 + weights in a save 15.3 = 106.8 GiB of host "
            "memory, but cluster.host_memory_gb is 100: raise cluster.num_gpus",
        ),
    ],
)
def test_the_first_part_that_does_not_fit_is_named(overrides, words):
    message = dry_run(load(["recipe=qwen3_8b", *overrides])).misfit()
    assert message is not None and words in message and "\n" not in message


def test_a_reference_beside_another_teacher_is_one_more_copy():
    def peak(*overrides: str) -> float:
        return dry_run(load(["recipe=qwen3_8b", *overrides])).memory[0].rollout_peak

    copy = 2 * dry_run(load(["recipe=qwen3_8b"])).stages[0].parameters / GIB
    for weights in ("ema", "current"):
        mixed_with_student = peak(f"teacher.weights={weights}", "target.anchor=student")
        assert peak(f"teacher.weights={weights}") - mixed_with_student == pytest.approx(copy)
    assert peak() - peak("teacher.weights=current", "target.anchor=student") == pytest.approx(copy)
    assert peak() == peak("target.anchor=student") == peak("teacher.weights=current")


def test_a_run_that_fits_with_one_copy_does_not_fit_with_a_second_one():
    small = ["recipe=qwen3_8b", "rollout.kv_cache_gb=1"]
    one, two = (dry_run(load([*small, f"teacher.weights={weights}"])) for weights in ("frozen", "ema"))
    between = (max(each.peak for each in one.memory) + max(each.peak for each in two.memory)) / 2
    small.append(f"cluster.gpu_memory_gb={between}")
    assert dry_run(load(small)).misfit() is None
    message = dry_run(load([*small, "teacher.weights=ema"])).misfit()
    assert message is not None and "needs" in message


def test_data_that_is_named_is_read_and_counted(data, tmp_path, capsys):
    overrides = tiny_run.overrides(data, tmp_path / "run", "cluster.num_gpus=2", "dry_run=true")
    assert main(overrides) == 0
    out = capsys.readouterr().out
    assert "40 problems fit" in out
    assert "the teacher's prompt adds 2 tokens of wording (data.teacher_template) and on average " in out
    assert not any(f"{key}=/path" in out for key in ("data.path", "data.tokenizer"))
    assert main([*overrides, "data.max_length=16"]) == EXIT_BAD_INPUT
    assert "problems.jsonl:1: expected a student's prompt" in capsys.readouterr().err


LOGS = ["recipe=chat_logs", *TINY]


def test_a_plan_for_logs_has_no_sampler_no_responses_and_no_memory_for_either(capsys):
    long_responses = ["rollout.max_new_tokens=4096", "rollout.num_samples=8"]
    server = ["rollout.engine=vllm", "rollout.placement=server", "rollout.engine_tp=3", "rollout.num_servers=1"]
    assert main([*LOGS, *long_responses, *server, "rollout.server_python=python", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "a step: 32 logged turns; contexts of at most 128" in out
    assert "responses: from the log; nothing is sampled" in out
    assert not any(words in out for words in ("KV cache", "while sampling", "vLLM", "rollout_nodes", "4096 tokens"))
    plan = dry_run(load([*LOGS, *long_responses]))
    assert plan.step.num_microbatches == dry_run(load(LOGS)).step.num_microbatches
    assert all(memory.rollout == {} and memory.peak == memory.training_peak > 0 for memory in plan.memory)


def test_the_replies_of_a_log_may_fill_their_contexts():
    def rows(*overrides: str) -> float:
        plan = dry_run(load([*LOGS, "schedule.pair_order=teacher_first", *overrides]))
        return plan.memory[-1].training["teacher states"]

    assert rows("data.max_length=128") == 2 * rows("data.max_length=64") > 0


def test_microbatches_are_those_of_the_longest_contexts_raised_to_what_interleaving_takes():
    interleaved = "parallel.pipeline_model_parallel_size=4 parallel.virtual_pipeline_model_parallel_size=2".split()
    assert microbatches(load(), 10, 4) == (3, 3)
    assert microbatches(load(interleaved), 10, 4) == (3, 6), "the reference reads the student's 3 once more"
    assert microbatches(load([*interleaved, "schedule.pair_order=alternating"]), 10, 4) == (4, 4)
    assert microbatches(load(["method.name=sft"]), 10, 4) == (3, 0)
    controls = ["target.control=other", "target.num_controls=2"]
    assert microbatches(load(controls), 10, 4) == (3, 9), "the teacher reads each response after three hints"
    assert microbatches(load([*controls, *interleaved, "schedule.pair_order=alternating"]), 10, 4) == (4, 12)
    mixed_with_student = [*interleaved, "target.anchor=student"]
    assert microbatches(load(mixed_with_student), 10, 4) == (5, 3)
    assert microbatches(load([*mixed_with_student, "schedule.pair_order=alternating"]), 10, 4) == (4, 4)


def test_one_node_is_launched_alone_and_several_meet_at_the_head():
    _, one = launch_commands(load(["cluster.num_gpus=4"]), ["a=b"])
    assert one.startswith("torchrun --standalone --nproc-per-node 4 -m ")
    _, two = launch_commands(load(["cluster.num_gpus=16"]), ["x=[1, 2]", "dry_run=true"])
    assert '--nnodes 2 --node-rank "$NODE_RANK" --master-addr "$HEAD" --nproc-per-node 8' in two
    assert "'x=[1, 2]'" in two and "dry_run" not in two


SERVERS = (
    "rollout.engine=vllm rollout.placement=server rollout.server_python=/vllm/python rollout.num_servers=3".split()
)


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        (["cluster.num_gpus=8"], "sbatch examples/slurm/one_node.sbatch"),
        (["cluster.num_gpus=16"], "sbatch --nodes=2 examples/slurm/many_nodes.sbatch"),
        (
            ["cluster.num_gpus=16", *SERVERS, "rollout.engine_tp=16"],
            "HF_CONFIG=/path/to/hf/config SERVER_PYTHON=/vllm/python SERVER_GPUS=16 SERVER_NODES=2 ROLLOUT_NODES=6 "
            "sbatch --nodes=8 examples/slurm/rollout_nodes.sbatch",
        ),
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
    assert sbatch.startswith(f"RUN_DIR='my runs/first' {command} a=b checkpoint.load=")
    script = shlex.split(sbatch)[shlex.split(sbatch).index("a=b") - 1]
    text = (REPOSITORY / script).read_text()
    for variable in (word.partition("=")[0] for word in shlex.split(sbatch.split(" sbatch ")[0])):
        assert f"\n{variable}=${{{variable}:" in text  # a parameter of the script
    assert "run_dir=" not in sbatch


def test_servers_that_slurm_starts_are_not_started_by_the_run_too():
    sbatch, _ = launch_commands(load([*SERVERS, "cluster.num_gpus=8"]), SERVERS)
    words = shlex.split(sbatch)
    overrides = words[words.index("examples/slurm/rollout_nodes.sbatch") + 1 :]
    rollout = load([*overrides, "rollout.servers=[http://node7:8000]"]).rollout
    assert rollout.num_servers == 0 and rollout.servers == ["http://node7:8000"]


# Stages, pairs and the time of teacher_first, from another simulator of Megatron's order.
KNOWN = [(4, 8, 41), (4, 128, 521), (8, 8, 53), (8, 64, 277), (16, 16, 109), (16, 128, 557)]


@pytest.mark.parametrize(("pp_size", "pairs", "time"), KNOWN)
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


SMALL = ["cluster.num_gpus=1", "cluster.gpu_memory_gb=24", "model.vocab_size=49152"]


def test_the_first_line_of_a_plan_says_whether_it_fits(capsys):
    assert plan.main(SMALL) == 0
    assert re.fullmatch(r"fits: 10\.\d of 24 GiB per GPU", capsys.readouterr().out.splitlines()[0])
    assert plan.main([*SMALL, "cluster.gpu_memory_gb=4", "rollout.kv_cache_gb=1"]) == EXIT_BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == f"does not fit: {captured.err.removeprefix('plan: ').strip()}"
