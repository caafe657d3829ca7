# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Examples learn what they say: adapters, a base's own logs, a Hugging Face directory, a hint that leaks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from _lib import leaking_subtraction, pretraining, subtraction, subtraction_chats
from _lib.watched_runs import WITHOUT_GUARDS, watch
from megatron_selfdistill.metrics.run_log import read_metrics

pytestmark = pytest.mark.full


def test_adapters_learn_what_all_weights_learn_with_a_smaller_checkpoint(load_example, base, root, monkeypatch, capsys):
    example = load_example("11_adapters")
    made, show, train = [], example.table, example.train_variant

    def seldom_evaluated(variant, *rest):
        return train(dataclasses.replace(variant, overrides=(*variant.overrides, "evaluation.every=100")), *rest)

    monkeypatch.setattr(example, "train_variant", seldom_evaluated)
    monkeypatch.setattr(example, "table", lambda rows: made.extend(rows) or show(rows))
    assert example.main(["--steps", "100", "--ranks", "4", "--directory", str(root)]) == 0
    whole, adapted = made
    assert whole.before == adapted.before < 0.5
    assert min(whole.greedy, adapted.greedy) > 0.9 and adapted.sampled > whole.sampled - 0.05
    assert adapted.checkpoint_bytes < whole.checkpoint_bytes / 3
    assert "against all weights, with a checkpoint of" in capsys.readouterr().out


def test_a_base_learns_from_its_own_logs_without_sampling(load_example, root, monkeypatch, shorten):
    example = load_example("08_chat_logs")
    monkeypatch.setattr(example, "NUM_SESSIONS", 60)
    shorten(subtraction_chats, 100)
    assert example.main(["--steps", "2", "--directory", str(root)]) == 0
    directory = root / "chat_logs" / "seed5"
    records = [json.loads(line) for line in (directory / "conversations.jsonl").read_text().splitlines()]
    assert len(records) == 60 and all(record["messages"][0]["role"] == "user" for record in records)
    logged, likely, sampled = (
        read_metrics(directory / name) for name in ("chat_logs", "chat_logs__likely_turns", "sampled_anew")
    )
    assert any("turns/unlikely_share" in line for line in likely)
    assert any("turns/log_prob_mean" in line for line in logged)
    assert not any("seconds/rollout" in line for line in logged) and any("seconds/rollout" in line for line in sampled)
    assert (root / "chat_logs" / "chat_logs.png").stat().st_size > 10_000


def test_a_hugging_face_directory_becomes_one_with_the_logits_of_the_model(load_example, root, monkeypatch, capsys):
    example, trained = load_example("06_from_hugging_face"), []
    monkeypatch.setattr(example, "PRETRAINING_STEPS", 10)
    monkeypatch.setattr(example, "NUM_SHOWN", 20)
    task, train = example.subtraction_task(5, root), example.train
    monkeypatch.setattr(example, "train", lambda *arguments: trained.append(train(*arguments)) or trained[-1])
    assert example.main(["--directory", str(root), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "after" in shown and "selfdistill convert megatron-to-hf" in shown
    directory = root / "from_hugging_face" / "seed5" / "self_distilled"
    (tokenizer, before), (_, after) = example.load(task.hf), example.load(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert tokenizer("500-408:")["input_ids"] == [5, 0, 0, 10, 4, 0, 8, 16]
    assert before.state_dict().keys() == after.state_dict().keys()
    assert not any(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    [(texts, live)] = trained
    assert example.largest_difference(directory, texts, live) <= 1e-4
    assert example.largest_difference(task.hf, texts, live) > 1e-2, "the start has other logits"


def test_the_anchor_keeps_the_work_that_the_teacher_alone_drops(load_example, root):
    example = load_example("09_leaking_hint")
    few = dataclasses.replace(leaking_subtraction.TASK, held_out_problems=lambda: subtraction.held_out_problems()[:150])
    base = pretraining.make_base(few, 5, root / "bases")
    problems = pretraining.write_records(root / "leaking.jsonl", leaking_subtraction.TASK.training_problems(5))
    work, sampled = {}, {}
    for variant in (example.TEACHER_ALONE, example.ANCHORED):
        unguarded = variant.on(problems, *WITHOUT_GUARDS)
        before, after = watch(unguarded, base, root / "leaking" / variant.title, (0, 100))
        work[variant], sampled[variant] = after.shows_work, after.sampled
    assert before.shows_work > 0.85
    assert work[example.TEACHER_ALONE] < 0.6 < 0.8 < work[example.ANCHORED]
    assert sampled[example.ANCHORED] > sampled[example.TEACHER_ALONE] + 0.2
