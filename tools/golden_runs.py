# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Golden runs: short seeded runs of every method, which show that a reorganisation changes nothing that is computed.

    python tools/golden_runs.py --write golden.json                  with the code before the change, in four minutes
    python tools/golden_runs.py --compare golden.json                with the code after it: prints every difference
    python tools/golden_runs.py --compare golden.json --quick        only the cases of one rank, in one minute
    python tools/golden_runs.py --compare golden.json --only grpo    only the named cases

A case is ten steps of a tiny model on a CPU.  For every case, the file holds each logged number of each step as an
exact hexadecimal float, and SHA-256 hashes of the trained weights and of the whole last checkpoint.  Times, throughput
and memory are left out.  The hashes cover the names of the tensors, so that they also change where a tensor is renamed.

`CASES` is the only place that spells keys: after keys are renamed, the options change and the names of the cases stay.
The numbers depend on the machine's instructions, so write and compare on one machine with one environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support", REPOSITORY / "examples"):
    if str(_directory) not in sys.path:
        sys.path.insert(0, str(_directory))

import tiny_run  # noqa: E402
from ranks import RankError, RankPool  # noqa: E402

NUM_STEPS = 10
SAME_INSTRUCTIONS = {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""These make sums independent of the alignment of memory."""

VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
SAMPLED = ["data.global_batch_size=4", "rollout.num_samples=4", "rollout.max_new_tokens=10", "rollout.temperature=1"]
REWARDED = [*SAMPLED, VERIFIED, "data.on_long_context=drop"]
HINTED = [*SAMPLED, VERIFIED, "data.on_long_context=truncate_end"]
EPISODES = [*SAMPLED, "data.on_long_context=drop", "environment.name=replying.Replying"]
CHATS = ["data.path={data}/hindsight.jsonl", "data.chat_template={data}/template.jinja", "data.global_batch_size=6"]
JUDGE = ["method.judge=hint_functions.hint_of", "method.min_length=3"]
JUDGED = [*CHATS, *JUDGE, "rollout.max_new_tokens=10", "data.on_long_context=truncate_end"]
STATING = ["data.tokenizer={data}/stating_tokenizer", "data.student_template='{problem}'"]
STATING += ["schedule.max_tokens=1024", "rollout.max_new_tokens=64", "model.max_position_embeddings=512"]
OWN = ["method.name=own_solutions", "method.refresh_every=2", "method.num_samples=6", "method.pick=learnable"]
GUIDED = ["rollout.guidance=mixed", "loss.divergence=forward_kl", "target.teacher_weight=2"]
GUIDED_BELOW = [*GUIDED, "rollout.guide_below=0.5", "data.limit=8"]
TP2_PP2 = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]


@dataclass(frozen=True)
class Case:
    """A run: the options that tiny_run.overrides gets, with ``{data}`` for the directory of the data."""

    options: Sequence[str]
    num_ranks: int = 1
    kill_at: str | None = None
    """A place of tiny_run.killed_at, where the run is killed; it is then resumed from its last checkpoint."""
    num_steps: int = NUM_STEPS


def recipe(name: str, *options: str) -> list[str]:
    """Return the options of a run of the recipe ``name``."""
    return [f"recipe={name}", *options]


CASES = {
    # The recipes that differ in method, each on one rank.
    "beta_opsd": Case(recipe("beta_opsd", *REWARDED, "method.signal=advantage", "method.discount=0.9")),
    "caopd": Case(recipe("caopd", *REWARDED, *STATING)),
    "chat_logs": Case(recipe("chat_logs", *CHATS, "method.min_log_prob=-3.75")),
    "dapd": Case(recipe("dapd", *REWARDED)),
    "default": Case(recipe("default", VERIFIED)),
    "edge_opd": Case(recipe("edge_opd", *REWARDED)),
    "eopd": Case(recipe("eopd", *REWARDED, "method.threshold=2.47")),
    "esr": Case(recipe("esr", *REWARDED, "rollout.horizon=4")),
    "grpo": Case(recipe("grpo", *REWARDED)),
    "iw_opd": Case(recipe("iw_opd", *REWARDED)),
    "literal": Case(recipe("literal", VERIFIED)),
    "multi_teacher": Case(recipe("multi_teacher", VERIFIED)),
    "openclaw": Case(recipe("openclaw", *JUDGED, "method.reward=hint_functions.reward_of_reply")),
    "opsa": Case(recipe("opsa", *SAMPLED, "data.on_long_context=drop")),
    "opsd": Case(recipe("opsd", *REWARDED)),
    "opsd_rl": Case(recipe("opsd_rl", *REWARDED)),
    "ovd": Case(recipe("ovd", *REWARDED, "method.template='{problem}{response}|'", "method.step_separator=','")),
    "past": Case(recipe("past", *HINTED, "method.num_retries=2", "method.teacher_steps=2")),
    "pi_distill": Case(recipe("pi_distill", *REWARDED)),
    "pw_opsd": Case(recipe("pw_opsd", *REWARDED)),
    "rft": Case(recipe("rft", *REWARDED)),
    "rlcsd": Case(recipe("rlcsd", *REWARDED, "rollout.max_new_tokens=24")),
    "rlt": Case(recipe("rlt", *REWARDED, "method.closing_tag=-")),
    "rltf_fm": Case(recipe("rltf_fm", *EPISODES, "method.reply_template='{problem}{response}'")),
    "rltf_sd": Case(recipe("rltf_sd", *EPISODES, "method.revision_min_log_prob=null")),
    "scope": Case(recipe("scope", *REWARDED)),
    "sdft": Case(recipe("sdft", *REWARDED)),
    "sdpo": Case(recipe("sdpo", *REWARDED)),
    "sdpo_feedback": Case(recipe("sdpo_feedback", *HINTED, EPISODES[-1])),
    "skald": Case(recipe("skald", *REWARDED, "method.num_hinted=4")),
    "skill_sd": Case(
        recipe("skill_sd", *HINTED, "method.keep=2", "method.summarizer=hint_functions.skill_of", "data.limit=8")
    ),
    "sod": Case(recipe("sod", *EPISODES, VERIFIED, "environment.max_turns=3")),
    "sr_opsd": Case(recipe("sr_opsd", *REWARDED)),
    "teacher_alone": Case(recipe("teacher_alone", VERIFIED)),
    "tip": Case(recipe("tip", *REWARDED)),
    "u_opsd": Case(recipe("u_opsd", *HINTED, "method.threshold=0.2")),
    "uni_opd": Case(recipe("uni_opd", *REWARDED)),
    "veto": Case(recipe("veto", *REWARDED)),
}
RECIPES = tuple(CASES)
"""The names of the recipes that differ in method."""
CASES |= {
    # Replicas, and a run that is killed and resumed.
    "grpo on DP2": Case(recipe("grpo", *REWARDED), num_ranks=2),
    "default, killed and resumed": Case(recipe("default", VERIFIED), kill_at="step"),
    # Options of the methods, which no recipe sets.
    "guided": Case(recipe("default", VERIFIED, *GUIDED)),
    "guided below a pass rate": Case(recipe("default", VERIFIED, *GUIDED_BELOW)),
    "sft": Case(["method.name=sft"]),
    "off-policy": Case(
        recipe("teacher_alone", VERIFIED, "method.view=privileged", "loss.divergence=forward_kl"),
    ),
    "own solutions": Case(recipe("default", *REWARDED, *OWN)),
    "hints of a function": Case(
        recipe("opsd_rl", *HINTED, "method.name=sdpo", "method.hints=hint_functions.first_right_text")
    ),
    "selection of a function": Case(recipe("opsd", *HINTED, "method.select=hint_functions.without_last_character")),
    "openclaw, full divergence": Case(recipe("openclaw", *JUDGED, "method.weight=0", "method.signal=full")),
    "episodes": Case(recipe("default", *EPISODES, "environment.max_turns=3", "method.name=opsd_rl")),
    "chats sampled anew": Case(recipe("chat_logs", *CHATS, "conversations.responses=sampled")),
    "default, evaluated": Case(
        recipe("default", VERIFIED, "evaluation.path={data}/problems.jsonl", "evaluation.every=5", "evaluation.limit=4")
    ),
}
# Launched layouts: four ranks for every recipe.
CASES |= {f"{name} on TP2 x PP2": Case([*CASES[name].options, *TP2_PP2], 4) for name in (*RECIPES, "guided")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; write them or compare them; return 1 if there is any difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the numbers of all runs")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with the numbers of an earlier call")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=list(CASES), help="run these cases only")
    parser.add_argument("--quick", action="store_true", help="leave out the cases of several ranks")
    options = parser.parse_args(arguments)
    if options.write is None and options.compare is None:
        parser.error("give --write FILE, --compare FILE, or both")
    expected = json.loads(options.compare.read_text(encoding="utf-8")) if options.compare else None
    names = options.only or [name for name, case in CASES.items() if not options.quick or case.num_ranks == 1]
    found: dict[str, Any] = {}
    num_different = 0
    with tempfile.TemporaryDirectory(prefix="selfdistill_golden_") as path:
        pool = RankPool(environment=SAME_INSTRUCTIONS)
        try:
            directory = Path(path)
            data = make_data(directory / "data")
            start = f"checkpoint.load={make_start(pool, data, directory / 'start')}"
            for number, name in enumerate(names):
                began = time.perf_counter()
                found[name] = run(pool, CASES[name], data, directory / str(number), start)
                verdict = ""
                if expected is not None:
                    lines = differences(expected.get(name), found[name])
                    num_different += bool(lines)
                    verdict = "; DIFFERS" if lines else "; equal"
                    print("\n".join(f"{name}: {line}" for line in lines), end="\n" if lines else "")
                print(f"[golden] {name}: {time.perf_counter() - began:.1f} s{verdict}", flush=True)
        finally:
            pool.close()
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if expected is not None:
        print(f"[golden] {len(names) - num_different} of {len(names)} cases are equal to the last bit")
    failed = [name for name in names if "error" in found[name]]
    return 1 if num_different or failed else 0


def make_data(directory: Path) -> Path:
    """Write problems, tokenizers and conversations; return the directory."""
    from _lib import subtraction
    from _lib.pretraining import write_records, write_tokenizer

    tiny_run.write_data(directory)
    write_tokenizer(directory / "stating_tokenizer", subtraction.TASK.alphabet + "CNfidencTheomprcalqusxv.:' \n")
    tiny_run.write_chats(directory, ["1"])  # for the template
    records: list[Any] = []
    for number, (a, b) in enumerate(subtraction.distinct(30, "train", seed=1)):
        texts = [subtraction.problem_text(a, b), f"{number:03d};", "X", subtraction.answer(a, b), "thanks"]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        records.append({"messages": messages})
    write_records(directory / "hindsight.jsonl", [*records, {"messages": records[0]["messages"][:2]}])
    return directory


def make_start(pool: RankPool, data: Path, run_dir: Path) -> Path:
    """Train one step; return its checkpoints, from which every layout starts with the same weights."""
    tiny_run.train(pool, tiny_run.overrides(data, run_dir, "num_steps=1"))
    return run_dir / "checkpoints"


def run(pool: RankPool, case: Case, data: Path, run_dir: Path, start: str) -> dict[str, Any]:
    """Return the metrics of every step and the hashes of the last checkpoint, or the error of the run."""
    options = [option.replace("{data}", str(data)) for option in case.options]
    has_own_tokenizer = any(option.startswith("data.tokenizer=") for option in options)
    options += [] if has_own_tokenizer else [start]  # another tokenizer has another vocabulary
    save_every = f"checkpoint.save_every={3 if case.kill_at else case.num_steps}"
    steps = [f"num_steps={case.num_steps}", save_every, "optimizer.lr_warmup_steps=0"]
    arguments = tiny_run.overrides(data, run_dir, *steps, *options)
    train: Callable[..., None] = partial(tiny_run.train, pool, arguments, case.num_ranks)
    try:
        if case.kill_at:
            try:
                train(kill_at=case.kill_at)
            except RankError:
                pass
            else:
                raise AssertionError("the run was not killed")
        train()
        (hashes,) = pool.run(hashes_of, run_dir, case.num_steps, world_size=1)
        return {"steps": logged(run_dir), **hashes}
    except AssertionError as error:
        print(error, file=sys.stderr)
        return {"error": str(error).strip().splitlines()[-1]}


def logged(run_dir: Path) -> list[dict[str, str]]:
    """Return the numbers of every step as hexadecimal floats, without times, throughput and memory."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = {line["step"]: line for line in lines}  # a resumed run logs a step again
    return [
        {
            key: float(value).hex() if isinstance(value, int | float) else repr(value)
            for key, value in sorted(line.items())
            if not key.startswith(tiny_run.NOT_REPRODUCIBLE)
        }
        for line in steps.values()
    ]


def hashes_of(run_dir: Path, step: int) -> dict[str, str]:
    """Return SHA-256 hashes of a checkpoint: of the trained weights, and of all tensors; on one rank of a group."""
    import torch

    weights, everything = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(tiny_run.final_tensors(run_dir, step).items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        content = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
        content += tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        everything.update(content)
        if not name.startswith(("optimizer", "teacher", "ema")):
            weights.update(content)
    return {"weights": weights.hexdigest(), "checkpoint": everything.hexdigest()}


def differences(expected: dict[str, Any] | None, found: dict[str, Any]) -> list[str]:
    """Return one line for each number and each hash that differs; at most the first forty."""
    if expected is None:
        return ["the file has no such case"]
    if "error" in expected or "error" in found:
        errors = expected.get("error"), found.get("error")
        return [] if errors[0] == errors[1] else ["the run ended with {1!r}, expected {0!r}".format(*errors)]
    lines = [f"{key} differs" for key in ("weights", "checkpoint") if expected[key] != found[key]]
    if len(expected["steps"]) != len(found["steps"]):
        lines.append(f"{len(found['steps'])} steps, expected {len(expected['steps'])}")
    for number, (one, other) in enumerate(zip(expected["steps"], found["steps"], strict=False), start=1):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                lines.append(f"step {number}, {key}: expected {_shown(one.get(key))}, found {_shown(other.get(key))}")
    return lines[:40]


def _shown(value: str | None) -> str:
    """Return a number in decimal and in hexadecimal notation, or what stands in its place."""
    try:
        return "nothing" if value is None else f"{float.fromhex(value)!r} ({value})"
    except ValueError:
        return str(value)


if __name__ == "__main__":
    import golden_runs  # the ranks import functions by the name of their module

    sys.exit(golden_runs.main())
