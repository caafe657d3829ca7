# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``data`` and ``conversations`` of the schema: problems, tokenizer, prompts and chat logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_selfdistill.annexes import door
from megatron_selfdistill.config.schema.field_checks import Part, require, require_range
from megatron_selfdistill.config.schema.method_config import FOUND, GIVEN, HINTED
from megatron_selfdistill.config.schema.ranges import FilePath, Name, OneOf, PositiveInt, Text


@dataclass(frozen=True)
class EnvironmentConfig(
    Part,
    section="environment",
    free="options.url options.api_key_env limits.seconds limits.memory_gb limits.concurrency",
):
    """The environment that replies to the sampled responses, with texts and rewards."""

    name: Annotated[str, OneOf(("none", "tools"), or_dotted=True)] = "none"
    """The environment: none, tools (the methods of a class, which responses call and prompts show) or the dotted path
    of a class, or of a function that makes an environment, such as package.module.Class.  With an environment, the
    reward of a response is the reward of the reply to it, unless method.reward names a function."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class or the function that name names.  Those of tools are tools (the dotted path of the
    class), parser (hermes, llama, glm or a dotted path) and options (the keyword arguments of the class).  The files of
    the run show all these values: name the environment variable of a secret, as api_key_env, and never write the
    secret.  The processes of sessions have the variable that api_key_env names."""
    max_turns: PositiveInt = 1
    """Greatest number of responses in an episode.  1 takes rewards and feedback from the environment and shows the
    student no reply."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Limits of an episode: tokens (of its responses; an episode that has so many gets no further turn), one_sequence
    (false; whether an episode is one sequence of tokens, which sampling continues and training reads once), and of a
    session, which a class with reset and step has: seconds (60; of one reset or step), memory_gb (8; of each of its
    processes; null is none) and concurrency (16; the sessions of a rank that work at the same time)."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where the episodes would not be those that the keys describe."""
        if self == EnvironmentConfig():
            return
        name, method = f"environment.name={self.name}", f"method.name={config.method.name}"
        require(self.name != "none", "the section environment has settings, but environment.name is none: set it")
        require(
            "api_key" not in self.options,
            "environment.options.api_key would be written into the files of the run: put the key into an environment "
            "variable, and name the variable with environment.options.api_key_env",
        )
        require(
            config.needs.samples is not None and config.data.kind == "problems",
            f"{name} replies to sampled responses to problems: it needs a method that samples and data.kind=problems, "
            f"got {method} and {config.data.kind}",
        )
        require(
            config.needs.hint == GIVEN or not joins_turns(config),
            f"environment.limits.one_sequence=true needs the prompts of an episode to stay as they were sampled, but "
            f"{method} gives each turn a hint of its own later: set environment.limits.one_sequence=false",
        )


@dataclass(frozen=True)
class DataConfig(
    Part,
    section="data",
    # A resumed run compares the problems, not the names of the files.
    free="path split subset fields limit on_bad_record max_length global_batch_size trust_remote_code "
    "allow_other_tokenizer",
):
    """The problems, the tokenizer and the prompts."""

    kind: Annotated[str, OneOf(("problems", "conversations"))] = "problems"
    """The kind of the records: problems (with solutions), or conversations (chat logs; see the section
    conversations)."""
    path: FilePath | None = None
    """The place of the records: a file (.jsonl, .json or .parquet), a directory of such files, a
    glob, or the name of a data set on the Hugging Face hub."""
    split: Name = "train"
    """Split of a hub data set."""
    subset: Text | None = None
    """Subset (configuration) of a hub data set; null is the default subset."""
    fields: dict[str, Text] = field(default_factory=dict)
    """Name of a field -> name of the column that holds it.  Problems have the fields problem, solution, answer, id,
    messages and, with the key teachers, teacher; conversations have messages, accepted, tools and id."""
    on_bad_record: Annotated[str, OneOf(("error", "skip"))] = "error"
    """The reaction to a bad record: error (the run ends) or skip (the record is counted and skipped)."""
    limit: PositiveInt | None = None
    """Number of records that are used, from the first one on; null is all."""
    tokenizer: FilePath | None = None
    """The tokenizer: a Hugging Face directory or a SentencePiece .model file."""
    trust_remote_code: bool = False
    """Whether to run the Python code in the tokenizer's directory that its auto_map names.  The code can do whatever
    you can do: read it first."""
    allow_other_tokenizer: bool = False
    """Whether the tokens of the tokenizer may differ from the tokens of the tokenizer in the checkpoint."""
    chat_template: FilePath | None = None
    """Chat template in Jinja, or the path of its file; null, as an empty text, takes the template of the tokenizer."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as enable_thinking."""
    system_prompt: Text | None = None
    """System prompt of both contexts; null is none."""
    views: dict[str, Any] = field(default_factory=dict)
    """What the prompts of student and teacher do not share: the entries student and teacher, each with
    chat_template_kwargs (added to those of both), system_prompt (in place of that of both; null is none) and
    generation_prompt (the text after the last message, in place of what the chat template writes).  With
    {student: {chat_template_kwargs: {enable_thinking: false}}} the student answers at once and the teacher thinks."""
    student_template: Text = "{problem}"
    """The student's user message, with the slot {problem}."""
    teacher_template: Text | None = None
    """The teacher's user message, with the slots {problem} and {solution}; null takes the wording of
    the method."""
    global_batch_size: PositiveInt = 32
    """Number of problems (of turns, where the records are conversations) per step, over all data-parallel ranks."""
    max_length: PositiveInt | None = None
    """Length of the longest context, in tokens; null is model.max_position_embeddings, or the longest packed sequence
    (schedule.max_tokens) if that is shorter."""
    on_long_context: Annotated[str, OneOf(("error", "drop", "truncate_start", "truncate_end"))] = "error"
    """The reaction to a teacher's context that is too long: error, drop (the problem is skipped), or truncate_start or
    truncate_end (this end of the solution is cut off)."""
    solutions: Annotated[str, OneOf(("given", "answer", "other", "none"))] = "given"
    """The text of the data that serves as the solution: given (the solution) or answer (the answer alone); as ablations
    that show what the hint does, other (the solution of another problem, drawn by seed) or none (an empty text in the
    teacher's wording).  A method whose hints are other texts, such as method.name=own_solutions, sdpo or skill_sd, does
    not read it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"problem", "solution", "answer", "id", "messages", "tools", "teacher"}
        if self.kind == "conversations":
            known |= {"accepted"}
        for name in self.fields:
            require_range("a key of data.fields", Annotated[str, OneOf(tuple(sorted(known)))], name)
        for name, view in self.views.items():
            require_range("a key of data.views", Annotated[str, OneOf(("student", "teacher"))], name)
            check_view(f"data.views.{name}", view)


def check_view(key: str, view: Any) -> None:
    """Raise `ConfigError` unless ``view``, the value of ``key``, is a mapping of what a prompt may have for itself."""
    entries = {"chat_template_kwargs": dict[str, Any], "system_prompt": Text | None, "generation_prompt": Text | None}
    require(isinstance(view, dict), f"{key} must be a mapping, such as {{system_prompt: Think.}}, got {view!r}")
    for entry, value in view.items():
        require_range(f"a key of {key}", Annotated[str, OneOf(tuple(entries))], entry)
        require_range(f"{key}.{entry}", entries[entry], value)


@dataclass(frozen=True)
class ConversationsConfig(Part, section="conversations", free="show_contents"):
    """The training on turns of logged conversations (data.kind=conversations)."""

    accepted_rule: Annotated[str, OneOf(("closing_turn", "marked"), or_dotted=True)] = "closing_turn"
    """Rule that finds the answer that the user accepted, where the log has no mark: closing_turn, marked (only marks
    count), or the dotted path of a function ``rule(messages) -> index or None``.  closing_turn takes the last assistant
    message before the last user message.  The user must then say thanks or go on, and neither correct nor repeat
    anything."""
    turns: Annotated[str, OneOf(("all", "before_accepted"))] = "all"
    """Turns that are trained on: all (the accepted turn too, with its own text as the hint) or before_accepted."""
    responses: Annotated[str, OneOf(("logged", "sampled"))] = "logged"
    """The responses: logged (the tokens of the log; nothing is sampled, and no sampler is built) or sampled (a new
    rollout for each turn)."""
    show_contents: bool = False
    """Whether messages about bad records may quote the log, and metrics.show_samples may show its turns."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where the keys of sampled responses would be ignored, or the hint would be another."""
        needs, method = config.needs, f"method.name={config.method.name}"
        require(
            not (config.logged and needs.samples is not None and (needs.own_prompts or needs.compares)),
            f"{method} needs sampled responses, but conversations.responses=logged samples nothing",
        )
        require(
            config.logged or needs.samples is not None or not needs.compares,
            f"{method} samples nothing, and takes the replies of a log: it needs data.kind=conversations and "
            f"conversations.responses=logged, got {config.data.kind} and {self.responses}",
        )
        if config.data.kind != "conversations":
            return
        require(
            config.needs.teacher_prompt == HINTED and config.needs.hint != FOUND,
            "data.kind=conversations needs a method whose teacher sees what follows a turn of the log, such as "
            f"method.name=default, chat_logs or openclaw, got {config.method.name}",
        )
        require(
            self.responses != "logged" or config.loss.rollout_correction == "none",
            "conversations.responses=logged samples nothing: unset loss.rollout_correction, or set "
            "conversations.responses=sampled",
        )


def plays_episodes(config: Any) -> bool:
    """Return whether an environment replies to each response, which is then a turn of an episode and has its reward."""
    return bool(config.environment.name != "none")


def episodes_key(config: Any) -> str:
    """Return the key that says what replies, with its value."""
    return f"environment.name={config.environment.name}"


def contexts_per_sample(config: Any) -> int:
    """Return the most contexts that a step trains of a sample: those of each turn, and those that the method adds."""
    return int(config.environment.max_turns * config.needs.contexts_per_sample)


def joins_turns(config: Any) -> bool:
    """Return whether an episode is one sequence of tokens, which sampling continues and training reads once."""
    return bool(config.environment.limits.get("one_sequence", False))


def shown_tools(config: Any) -> dict[str, Any]:
    """Return the variable of the chat template with the tools that responses may call; empty without such tools."""
    tools = config.environment.options.get("tools") if config.environment.name == "tools" else None
    return {} if tools is None else {"tools": door("environments").schemas_of(tools)}


def log_reader(config: Any) -> Any:
    """Return the function that reads the records as turns of a log; None if the records are problems."""
    return None if config.data.kind == "problems" else door("chat_logs").read_log


def judges_responses(config: Any) -> bool:
    """Return whether every response gets a reward before the step trains, for the method or as a turn."""
    return config.samples_responses and bool(config.needs.rewards or plays_episodes(config))
