# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run checks all its inputs before it starts, and one message names an input that cannot be read."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_selfdistill.config import Config, from_mapping, load
from megatron_selfdistill.config.world_checks import longest_context
from megatron_selfdistill.data import run_data as run_data_module
from megatron_selfdistill.data.fitted_prompts import fit_teacher_prompt
from megatron_selfdistill.data.prompt_checks import about_prefix
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.errors import ConfigError, MissingChatTemplateError
from megatron_selfdistill.rollout.factory import sampling_params

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHARACTERS = "0123456789-=b.,;:|H$_"


def character_tokenizer(directory: Path, **special: str) -> None:
    """Write a Hugging Face directory with one token per character."""
    words = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_", **special).save_pretrained(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Problems of one length and solutions of 3, 8 and 60 characters, and two tokenizers."""
    directory = tmp_path_factory.mktemp("run_data")
    write(directory / "problems.jsonl", [{"problem": "500-408=", "solution": "0" * n} for n in (3, 8, 60)])
    write(directory / "held_out.jsonl", [{"problem": "1-1=", "solution": "0", "answer": "0"}] * 3)
    write(directory / "asked.jsonl", [{"problem": "1-0="}, {"problem": "2-0=", "answer": "2"}])
    write(directory / "english.jsonl", [{"problem": "What is 7?", "solution": "0000"}])
    answered = [{"problem": f"{i}-0=", "solution": f"0{i}", "answer": f"{i}"} for i in range(6)]
    write(directory / "answered.jsonl", answered)
    character_tokenizer(directory / "tokenizer", eos_token="$")
    character_tokenizer(directory / "endless")
    return directory


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def config_of(directory: Path, *overrides: str) -> Config:
    """Contexts of at most 40 tokens, 10 for the response: 9 of the wording leave 21 for a solution."""
    data = {"path": str(directory / "problems.jsonl"), "tokenizer": str(directory / "tokenizer")}
    data |= {"chat_template": PLAIN, "teacher_template": "{problem}{solution}|", "on_long_context": "drop"}
    values = {"data": data | {"max_length": 40}, "rollout": {"max_new_tokens": 10}}
    return from_mapping(OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides))))


def test_what_is_read_is_what_the_files_say(directory):
    held_out = directory / "held_out.jsonl"
    run_data = RunData.load(config_of(directory, f"evaluation.path={held_out}", "evaluation.limit=2"))
    assert [p.solution for p in run_data.problems.problems] == ["000", "0" * 8]
    assert len(run_data.evaluation) == 2 and run_data.evaluation[0].answer == "0"
    assert (run_data.vocab_size, run_data.max_length) == (len(CHARACTERS), 40)
    assert run_data.stop_token_ids == (CHARACTERS.index("$"),)
    (directory / "template.jinja").write_text(PLAIN)
    by_file = RunData.load(config_of(directory, f"data.chat_template={directory}/template.jinja"))
    assert by_file.prompts_digest == run_data.prompts_digest


EMPTY = "{% for m in messages %}x{% endfor %}"
HALF = "{% for m in messages %}{{ m.content.split('|')[0] }}{% endfor %}"
"""Shows what stands before the hint."""
BEGINNING = "{% for m in messages %}{{ m.content[:16] }}{% endfor %}"
"""Shows 8 characters of the problem and 8 of the solution."""
HINT_LAST = "data.teacher_template='{problem}|{solution}'"


def placed(directory: Path, overrides: list[str]) -> Config:
    return config_of(directory, *(one.replace("DIR", str(directory)) for one in overrides))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.path=DIR/nowhere.jsonl"], "nowhere.jsonl"),
        (["data.tokenizer=DIR/nothing.model"], "nothing.model"),
        (["data.chat_template=DIR"], "data.chat_template"),
        (["data.chat_template=null"], "data.chat_template"),
        (["data.tokenizer=DIR/endless"], "end of sequence"),
        (["model.vocab_size=20"], "model.vocab_size is 20"),
        (["schedule.max_tokens=39"], "data.max_length (40)"),
        (["schedule.max_tokens=3", "data.max_length=null", "parallel.context_parallel_size=2"], "schedule.max_tokens"),
        (["data.max_length=16"], "no problem fits"),
        (["data.teacher_template='{problem}" + "=" * 30 + "{solution}'"], "data.teacher_template 30"),
        (["data.path=DIR/asked.jsonl"], "field 'solution'"),
        (["data.path=DIR/asked.jsonl", "data.solutions=answer"], "an answer"),
        (["data.path=DIR/english.jsonl"], "set data.tokenizer"),
        (["data.path=DIR/english.jsonl", "method.name=grpo", "rollout.num_samples=2"], "set data.tokenizer"),
        ([f"data.chat_template='{EMPTY}'"], "problems.jsonl:1: expected the student's"),
        ([f'data.chat_template="{HALF}"', HINT_LAST], "problems.jsonl:1: expected the teacher's"),
        ([f'data.chat_template="{BEGINNING}"', "data.on_long_context=truncate_start"], "problems.jsonl:3: expected"),
        ([f'data.chat_template="{BEGINNING}"', "data.on_long_context=truncate_end"], "problems.jsonl:3: expected"),
    ],
)
def test_what_cannot_be_read_or_learned_from_is_refused_by_its_name(directory, overrides, named):
    with pytest.raises(ConfigError) as caught:
        RunData.load(placed(directory, overrides))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_of_a_shortened_solution_the_part_that_fits_is_shown_and_where_no_teacher_reads_none_is_looked_at(directory):
    for policy in ("truncate_start", "truncate_end"):
        assert RunData.load(config_of(directory, f"data.on_long_context={policy}")).num_shortened == 1
    hidden = [f'data.chat_template="{HALF}"', HINT_LAST, "evaluation.path=DIR/held_out.jsonl", "method.name=sft"]
    assert RunData.load(placed(directory, hidden)).about_prompts is None


def test_the_longest_context_is_the_least_of_model_row_and_wish(directory):
    for longest, overrides in [
        (4096, []),
        (100, ["schedule.max_tokens=100"]),
        (100, ["schedule.max_tokens=103", "parallel.context_parallel_size=2"]),
        (100, ["schedule.max_tokens=103", "parallel.tensor_model_parallel_size=4"]),
        (64, ["model.max_position_embeddings=64"]),
    ]:
        assert longest_context(config_of(directory, "data.max_length=null", *overrides)) == longest
    assert longest_context(config_of(directory)) == 40


def test_turns_of_a_log_are_read_under_other_names_beside_an_evaluation_under_its_own(directory, tmp_path):
    said = zip(("user", "assistant") * 3, ("1-1=", "1", "0", "00", ".", "3"), strict=True)
    chat = [{"role": role, "content": text} for role, text in said]
    write(tmp_path / "chats.jsonl", [{"chat": chat, "liked": 3}, {"chat": chat}, {"chat": chat[:1], "liked": 0}])
    write(tmp_path / "held_out.jsonl", [{"task": "1-1=", "solution": "0", "answer": "0"}])
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}${% endif %}{% endfor %}")
    options = ["data.kind=conversations", "data.on_bad_record=skip", f"data.path={tmp_path}/chats.jsonl"]
    fields = ["data.fields.messages=chat", "data.fields.accepted=liked", "data.fields.problem=task"]
    evaluated = f"evaluation.path={tmp_path}/held_out.jsonl"
    run_data = RunData.load(config_of(directory, *options, *fields, evaluated, f"data.chat_template={template}"))
    assert [(p.solution, p.reply.message["content"]) for p in run_data.problems.problems] == [("00", "1"), ("00", "00")]
    assert [p.messages[0]["content"] for p in run_data.evaluation] == ["1-1="]
    assert [line.rpartition("chats.jsonl:")[2][:2] for line in run_data.skipped] == ["2:", "3:"]
    assert len(run_data.about_records) >= 2


def test_an_evaluation_alone_checks_its_prompts_and_with_hints_the_teachers_too(directory):
    path = f"evaluation.path={directory}/held_out.jsonl"
    hidden = config_of(directory, path, f'data.chat_template="{HALF}"', HINT_LAST)
    assert len(RunData.load_evaluation(hidden).evaluation) == 3
    with pytest.raises(ConfigError, match=r"held_out.jsonl:1: expected the teacher's"):
        RunData.load_evaluation(hidden, with_solutions=True)
    with pytest.raises(ConfigError, match=r"held_out.jsonl:1: expected the student's"):
        RunData.load_evaluation(config_of(directory, path, f"data.chat_template='{EMPTY}'"))


@pytest.mark.parametrize("solutions", ["given", "other", "none", "answer"])
def test_training_and_a_hinted_evaluation_show_what_the_key_says(directory, solutions):
    of_file = [f"{section}.path=DIR/answered.jsonl" for section in ("data", "evaluation")]
    config = placed(directory, [*of_file, f"data.solutions={solutions}"])
    run_data = RunData.load(config)
    expected = {"given": lambda it: f"0{it.answer}", "none": lambda it: "", "answer": lambda it: it.answer}
    for it in [*run_data.problems.problems, *RunData.load_evaluation(config, with_solutions=True).evaluation]:
        if solutions == "other":
            assert it.solution != f"0{it.answer}" and it.solution.startswith("0")
        else:
            assert it.solution == expected[solutions](it)
    first = run_data.problems.problems[0]
    shown = run_data.tokenizer.encode(f"{first.messages[0]['content']}{first.solution}|")
    assert run_data.builder.teacher_prompt(first) == shown
    plain = RunData.load(placed(directory, of_file)).problems.fingerprint
    assert (run_data.problems.fingerprint == plain) == (solutions == "given")
    assert solutions in ("given", "answer") or f"data.solutions={solutions}" in run_data.about_prompts


@pytest.mark.parametrize("method", [["recipe=rft"], ["method.name=grpo", "rollout.num_samples=2"]])
def test_a_method_that_shows_no_solution_needs_neither_solutions_nor_answers(directory, method):
    with_file = [f"data.path={directory}/asked.jsonl", f"evaluation.path={directory}/asked.jsonl", "run_dir=unused"]
    with_file += [f"data.tokenizer={directory}/tokenizer", f"data.chat_template='{PLAIN}'", "data.max_length=40"]
    with_file += ["data.teacher_template='{problem}{solution}|'", "rollout.max_new_tokens=10"]
    found = RunData.load(load([*method, *with_file]))
    assert [len(found.problems.problems), len(found.evaluation)] == [2, 2]
    assert [it.answer for it in found.problems.problems] == [None, "2"]


SWITCHED = PLAIN + "{% if add_generation_prompt %}:{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"


@pytest.mark.parametrize(("student", "teacher"), [(True, False), (False, True), (True, True)])
def test_a_thinking_student_of_a_teacher_without_thoughts_is_warned_of(directory, student, teacher):
    views = {"student": student, "teacher": teacher}
    switches = [f"data.views.{name}.chat_template_kwargs.enable_thinking={on}" for name, on in views.items()]
    zeros = "0" * 60
    long = [f"data.student_template={zeros}{{problem}}", f"data.teacher_template={zeros}{{problem}}{{solution}}|"]
    (directory / "switched.jinja").write_text(SWITCHED)
    options = [*switches, *long, f"data.chat_template={directory}/switched.jinja", "data.max_length=300"]
    about = str(RunData.load(config_of(directory, *options)).about_prompts)
    assert ("response begins after" in about) == (student != teacher)
    assert ("known to collapse" in about) == (student and not teacher)


def test_parts_of_the_hub_are_read_for_training_and_evaluation(directory, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs["split"]))
        return [{"problem": "1-1=", "solution": "0", "answer": "0"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = ["data.path=lab/sums", "data.subset=hard", "data.split=val", "evaluation.path=lab/sums"]
    run_data = RunData.load(config_of(directory, *hub, "evaluation.subset=easy"))
    assert calls == [("lab/sums", "hard", "val"), ("lab/sums", "easy", "test")]
    assert run_data.evaluation[0].location == "lab/sums[test]:1"


def test_few_tokens_that_the_tokenizer_does_not_know_are_a_warning(directory, tmp_path):
    problems = [{"problem": problem, "solution": "0000"} for problem in ["500-408="] * 19 + ["500-4u8="]]
    write(tmp_path / "english.jsonl", problems)
    about = RunData.load(config_of(directory, f"data.path={tmp_path / 'english.jsonl'}")).about_prompts
    assert "warning: 0.5% of the tokens of the first prompts are '_'" in about
    assert "warning" not in RunData.load(config_of(directory)).about_prompts


def test_a_special_token_that_no_text_becomes_is_not_the_unknown_token(tmp_path):
    bytes_of_text = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**bytes_of_text, "$": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="$", eos_token="$")
    fast.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).unknown_id is None


TEACHERS = {"math": {"load": "/math"}, "code": {"load": "/code", "hint": "none", "template": "{problem}||"}}
TEACHERS |= {"default": {"template": "{solution}:{problem}"}}


def taught(directory: Path, teachers: list[object], of_run: dict = TEACHERS, **data: object) -> RunData:
    """Return the data of a run whose record i names ``teachers[i]``."""
    file = directory / "taught.jsonl"
    write(file, [{"problem": f"50{i}-4=", "solution": f"4{i}", "teacher": one} for i, one in enumerate(teachers)])
    config = config_of(directory)
    return RunData.load(replace(config, teachers=of_run, data=replace(config.data, path=str(file), **data)))


def pairs_of(run_data: RunData) -> list[tuple[str, ...]]:
    """Return the texts of the student's and of the teacher's prompts."""
    pairs = [run_data.builder.prompt_pair(problem) for problem in run_data.problems.problems]
    return [tuple(run_data.tokenizer.decode(one).replace(" ", "") for one in pair) for pair in pairs]


def test_each_teacher_has_its_own_wording_and_shows_the_solution_or_not(directory):
    run_data = taught(directory, ["math", "code", None])
    assert [teacher for _, teacher in pairs_of(run_data)] == ["500-4=40|", "501-4=||", "42:502-4="]
    for name, wording in {"math": "1 token", "code": "2 tokens", "default": "1 token"}.items():
        assert f"teacher {name} adds {wording}" in run_data.about_prompts


def test_each_teacher_has_its_own_view_in_place_of_that_of_all_teachers(directory):
    of_run = TEACHERS | {"math": TEACHERS["math"] | {"view": {"generation_prompt": "-", "system_prompt": "9"}}}
    run_data = taught(directory, list(of_run), of_run, views={"teacher": {"generation_prompt": ":"}})
    assert pairs_of(run_data) == [("500-4=", "9500-4=40|-"), ("501-4=", "501-4=||:"), ("502-4=", "42:502-4=:")]


def test_a_record_with_several_teachers_has_the_prompt_of_each(directory):
    run_data = taught(directory, [{"math": 1, "code": 3}])
    (problem,) = run_data.problems.problems
    limits = {"max_new_tokens": 10, "policy": "drop"}
    pair, decode = fit_teacher_prompt(run_data.builder, problem, max_length=40, **limits), run_data.tokenizer.decode
    found = [(one.teacher, one.share, decode(one.prompt).replace(" ", "")) for one in pair.of_teachers]
    assert found == [("code", 0.75, "500-4=||"), ("math", 0.25, "500-4=40|")]
    assert pair.teacher == "code"
    assert fit_teacher_prompt(run_data.builder, problem, max_length=18, **limits) is None, "that of math has 9 tokens"


def test_a_run_ends_responses_where_tokenizer_model_files_checkpoint_and_key_say(directory, tmp_path):
    """A run, an evaluation, one problem and chat logs agree."""
    hf = tmp_path / "hf"
    character_tokenizer(hf, eos_token="$")
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [CHARACTERS.index("|")]}))
    assets = tmp_path / "checkpoint" / "release" / "huggingface"
    assets.mkdir(parents=True)
    (assets / "config.json").write_text(json.dumps({"eos_token_id": CHARACTERS.index(";")}))
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("release")
    keys = [f"data.tokenizer={hf}", f"checkpoint.load={tmp_path / 'checkpoint'}", "rollout.stop_token_ids=[3]"]
    config = config_of(directory, *keys, f"evaluation.path={directory / 'held_out.jsonl'}")
    run_data = RunData.load(config)
    wanted = {CHARACTERS.index(one) for one in "$|;3"}
    assert set(run_data.stop_token_ids) == set(RunData.load_evaluation(config).stop_token_ids) == wanted
    assert set(RunData.of_problem(config, run_data.problems.problems[0]).stop_token_ids) == wanted
    talk = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"), ("user", "3"))]
    write(tmp_path / "log.jsonl", [{"messages": talk, "accepted": 1}])
    ended = PLAIN.replace("{{ m.content }}", "{{ m.content }}|")
    data = replace(config.data, kind="conversations", path=str(tmp_path / "log.jsonl"), chat_template=ended)
    method = from_mapping({"method": {"name": "chat_logs"}, "data": {"kind": "conversations"}}).method
    of_logs = RunData.load(replace(config, data=data, method=method))
    assert set(of_logs.stop_token_ids) == wanted and of_logs.stop_token_ids[0] == CHARACTERS.index("|")
    assert "a response ends at '$'" in run_data.ends.about and "';' " in run_data.ends.about


def with_bos(directory: Path) -> Path:
    """Write the tokenizer of a base model, which begins each text with H."""
    character_tokenizer(directory, eos_token="$", bos_token="H")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="H $A", special_tokens=[("H", CHARACTERS.index("H"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_prompts_without_the_first_token_of_every_text_have_a_warning_and_the_documented_template_none(
    directory, tmp_path
):
    base = with_bos(tmp_path / "base")
    without = RunData.load(config_of(directory, f"data.tokenizer={base}")).about_prompts
    assert f"warning: {base} begins a text with 'H'" in without
    config = config_of(directory, f"data.tokenizer={base}")
    documented = replace(config.data, chat_template="{{ bos_token }}" + PLAIN)
    run_data = RunData.load(replace(config, data=documented))
    assert "warning" not in run_data.about_prompts
    student, teacher = run_data.builder.prompt_pair(run_data.problems.problems[0])
    assert student[0] == teacher[0] == CHARACTERS.index("H") and student.count(student[0]) == 1
    for prompts in ([student[1:], teacher], [student, teacher[1:]]):
        assert "begins a text with 'H'" in (about_prefix(run_data.tokenizer, prompts) or ""), "one of both lacks it"
    assert "{{ bos_token }}{% for m in messages %}" in str(MissingChatTemplateError("x"))


def test_a_template_with_the_date_of_the_day_is_named_and_changes_the_digest_of_the_prompts(directory, monkeypatch):
    config = config_of(directory)
    dated = "{{ strftime_now('%d') if date_string is not defined else date_string }}" + PLAIN

    def of_day(day: int, **variables: str) -> RunData:
        clock = type("Clock", (), {"now": staticmethod(lambda: datetime.datetime(2026, 1, day))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        data = replace(config.data, chat_template=dated, chat_template_kwargs=variables)
        return RunData.load(replace(config, data=data))

    assert of_day(1).prompts_digest == of_day(1).prompts_digest != of_day(2).prompts_digest
    assert "fix the date: set data.chat_template_kwargs={date_string" in of_day(1).about_prompts
    fixed = [of_day(day, date_string="07") for day in (1, 2)]
    assert fixed[0].prompts_digest == fixed[1].prompts_digest and "date" not in fixed[0].about_prompts
    other_end = replace(config, rollout=replace(config.rollout, stop_token_ids=[3]))
    assert RunData.load(config).prompts_digest != RunData.load(other_end).prompts_digest


def test_samplers_choose_among_the_tokens_of_the_tokenizer_unless_a_key_allows_all_rows(directory):
    known = len(CHARACTERS)
    run_data = RunData.load(config_of(directory, "model.vocab_size=128"))
    assert (run_data.vocab_size, run_data.num_sampled_ids) == (128, known)
    config = config_of(directory, "model.vocab_size=128", "rollout.ids_without_token=true")
    assert RunData.load(config).num_sampled_ids == 128
    assert sampling_params(config, run_data).num_ids == known


def test_so_many_prompts_of_each_teacher_are_looked_at(directory, monkeypatch):
    monkeypatch.setattr(run_data_module, "LOOKED_AT", 2)
    assert len(RunData.load(config_of(directory, f"data.path={directory}/answered.jsonl")).first_prompts) == 2
