# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""README and the pages: links and keys exist, README stays short, examples are read as the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from record_sources import load_problems

from megatron_selfdistill import __version__
from megatron_selfdistill.cli import COMMANDS
from megatron_selfdistill.config import keys, load, method_keys
from megatron_selfdistill.config.methods import method_names
from megatron_selfdistill.data.prompts import DEFAULT_TEACHER_TEMPLATE
from megatron_selfdistill.data.records import FORMATS
from megatron_selfdistill.evaluation.verify import BUILT_IN
from megatron_selfdistill.loss.target import Target, mixed_target
from megatron_selfdistill.prechecks import needed_packages

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "megatron_selfdistill"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
]
NOT_KEYS = {
    *("loss.solver", "metrics.read_metrics", "metrics.tensorboard", "model.num_carried_mtp_layers"),
    *("rollout.extra_problems", "rollout.overlap"),
    *("method.right_weight", "loss.self_distillation_loss", "teachers.choose", "teachers.guide", "teachers.join"),
    *("loss.backward", "loss.item", "model.generate", "optimizer.step", "optimizer.zero_grad"),
    *("optimizer.multi_tensor_applier", "optimizer.multi_tensor_scale_impl"),
    *("model.safetensors", "report.html", "report.png", "target.html", "target.svg"),
}
"""Words of the form ``section.name`` that are no keys today: removed or renamed keys, Python, a user's key, files, and
entries of mappings."""


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings on which GitHub and MkDocs agree."""
    lines = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines()
    found = set()
    for title in (line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)):
        github = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        if github == re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip()):
            found.add(github)
    return found


def broken_links(page: Path) -> list[str]:
    """Return the relative links of the page that lead to no file of the repository, or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    assert broken_links(page) == []


def test_a_link_to_no_page_and_one_to_no_heading_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#three) [c](none.md) [d](page.md#one-two) ![e](f.svg) `[g](h.md)`\n")
    assert broken_links(page) == ["#three", "none.md", "f.svg"]


def missing_files(text: str) -> list[str]:
    """Return the Python files, with a directory, that a page names in code style and that do not exist.

    NAME stands for any name, so that a file with it is no file of today.
    """
    named = sorted(set(re.findall(r"`((?:[\w.]+/)+\w+\.py)`", text)))
    named = [name for name in named if "NAME" not in name]
    return [name for name in named if not any((root / name).exists() for root in (REPOSITORY, PACKAGE))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_python_file_that_a_page_names_exists(page):
    assert missing_files(page.read_text(encoding="utf-8")) == []


def test_a_file_that_moved_is_found():
    assert missing_files("`loss/target.py`, `tests/support/ranks.py`, `loss/no_target.py`") == ["loss/no_target.py"]


def test_the_design_names_directories_that_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    directories = {name for name in re.findall(r"`((?:[\w.]+/)+)`", text) if "NAME" not in name}
    assert len(directories) > 30
    assert {name for name in directories if not any((root / name).is_dir() for root in (REPOSITORY, PACKAGE))} == set()


@pytest.mark.parametrize("what", ["a method", "a reward", "a family of models", "an environment", "an instrument"])
def test_the_design_says_which_files_an_addition_touches(what):
    section = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Where to add\n")[2]
    (row,) = re.findall(rf"^\| \*\*{what}\*\* \|(.+)\|$", section.partition("\n## ")[0], re.MULTILINE)
    files, tests, without = row.split(" | ")
    assert files.strip() and "test" in tests and without.strip()


def test_the_design_names_four_files_for_the_method():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## The method in one file, and in four")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([\w/]+\.py)` \|", section, re.MULTILINE)
    assert len(named) == 4 and all((PACKAGE / name).is_file() for name in named)


def test_readme_is_short_and_narrow():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_the_first_screen_of_readme_has_what_a_reader_decides_by():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    _, begin, rest = readme.partition("<!-- first screen -->\n")
    screen, end, _ = rest.partition("<!-- end of the first screen -->\n")
    assert begin and end and screen.startswith("# ") and len(screen.splitlines()) <= 40
    assert f"version {__version__}." in screen and "pip install -e '.[train]'" in screen
    assert {"](docs/README.md)", "](CHANGELOG.md)", "](LICENSE)"} <= set(re.findall(r"\]\([^)#]+\)", screen))
    has_run = (DOCS / "support.jsonl").exists()
    assert ("Nothing has run on a GPU yet" in screen) != has_run


def installs_by_name(text: str) -> list[str]:
    """Return the commands of pip that would fetch this project from an index, where nobody holds its name."""
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)  # a message may continue in the string of the next line
    word = r"[\"']?(?!megatron[_-]selfdistill)[\w.\[\]<>=,-]+[\"']?"
    return [
        found[0]
        for found in re.finditer(
            rf"\bpip3? install(?: +{word})* +\\?[\"']?megatron[_-]selfdistill\b", joined, re.IGNORECASE
        )
    ]


def test_nobody_is_told_to_install_the_project_from_an_index():
    roots = ("megatron_selfdistill", "docs", "examples", "experiments", "tools", "configs", ".ci")
    endings = (".md", ".py", ".sh", ".sbatch", ".yaml", ".js", ".html", ".txt", "")
    files = [*PAGES, REPOSITORY / "Makefile", *(path for root in roots for path in (REPOSITORY / root).rglob("*"))]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file() and path.suffix in endings}
    assert {name_of(path): found for path, text in texts.items() if (found := installs_by_name(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        'pip install "megatron_selfdistill[wandb]"',
        "pip install --no-deps megatron-selfdistill",
        "\"both, or pip \"\n    'install torch megatron_selfdistill'",
        "'both, or pip install \\\"megatron_selfdistill[vllm]\\\"'",
    ],
)
def test_an_installation_by_name_is_found(text):
    assert len(installs_by_name(text)) == 1


def test_an_installation_from_a_clone_is_none_by_name():
    assert (
        installs_by_name("pip install -e '.[wandb]'  # megatron_selfdistill\npip install vllm; megatron_selfdistill")
        == []
    )


SIZES = [
    path.stem
    for path in sorted((REPOSITORY / "configs" / "recipe").glob("*.yaml"))
    if "num_gpus:" in path.read_text(encoding="utf-8")
]
"""The recipes of real sizes, which share one page."""


@pytest.mark.parametrize("recipe", SIZES)
def test_the_page_of_sizes_says_where_a_recipe_needs_vllm(recipe):
    page = (DOCS / "recipes" / "sizes.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{recipe}` \| .*$", page, re.MULTILINE)
    (needed,) = needed_packages(load([f"recipe={recipe}"]))
    words, rule = (
        (
            "beside the trainer",
            "the engines are beside the trainer, the trainer's environment needs vLLM: run `pip install",
        )
        if needed.is_here
        else ("servers of", "the engines are servers, the environment of `SERVER_PYTHON` needs vLLM")
    )
    assert words in row and rule in page


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    recipes = (DOCS / "recipes" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()
    of_methods = {f"{name}.md" for name in method_names()}
    assert of_methods | {"comparison.md", "sizes.md"} == set(re.findall(r"\]\((\w+\.md)\)", recipes))


@pytest.mark.parametrize(
    "recipe",
    (
        "default teacher_alone literal chat_logs grpo rft sdft opsd opsd_reference sdpo sdpo_feedback opsd_rl "
        "pi_distill scope uni_opd caopd rlt ovd rltf_sd rltf_fm sod skill_sd openclaw opsa pw_opsd beta_opsd "
        "veto u_opsd rlcsd eopd sr_opsd tip dapd past skald multi_teacher"
    ).split(),
)
def test_the_settings_of_a_recipe_are_those_of_its_file(recipe):
    settings = yaml.safe_load((REPOSITORY / "configs" / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    name = settings.get("method", {}).get("name", "default")
    page = (DOCS / "recipes" / f"{name}.md").read_text(encoding="utf-8")
    (shown,) = re.findall(rf"^`recipe={recipe}` sets:\n\n```\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    del settings["defaults"]
    assert yaml.safe_load(shown) == settings


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_that_a_page_names_exists(page):
    text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    sections = {key.partition(".")[0] for key in keys()}
    named = set(re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_]+)(?![\w./])", text))
    of_methods = {key for name in method_names() for key in method_keys(name)}
    known = (
        set(keys()) | of_methods | {f"{name}.{ending}" for name in sections for ending in ("json", "jsonl", "md", "py")}
    )
    assert named - known - NOT_KEYS == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w./=-])selfdistill ([a-z][a-z-]*)(?=[ `\n])", page.read_text(encoding="utf-8")))
    assert named <= COMMANDS.keys()
    assert page.name != "running.md" or len(named) >= 2


@pytest.mark.parametrize("page", ["data.md", "evaluation.md", "rollouts.md", "chat_logs.md", "monitoring.md"])
def test_the_pattern_of_keys_finds_some(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert len(set(re.findall(r"\b(?:data|evaluation|rollout|conversations|guards)\.[a-z_]+", text))) > 5


def test_the_page_about_running_lists_the_commands_of_the_help():
    text = (DOCS / "running.md").read_text(encoding="utf-8")
    listed = re.search(r"`selfdistill --help` lists the commands:(.*?)\.", text.replace("key=value ...", ""), re.DOTALL)
    assert listed is not None and re.findall(r"`(\w+)`", listed[1]) == list(COMMANDS)


def test_the_targets_that_the_page_about_the_method_shows_are_those_of_the_loss():
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| the teacher [^|]*\| ([^|]*)\| ([^|]*)\| ([0-9.]+)[^|]*\| ([^|]*)\|$", text, re.MULTILINE)
    assert len(rows) == 3
    for student, teacher, k, shown in rows:
        p, t, q = (
            torch.tensor([float(one) for one in row.split()], dtype=torch.float64) for row in (student, teacher, shown)
        )
        found = mixed_target(p.log()[None], t.log()[None], Target(anchor="student"))
        assert f"{1 / found.beta.item():.2f}" == k
        assert torch.equal(found.log_q[0].exp().round(decimals=3), q)
    fixed = mixed_target(p.log()[None], t.log()[None], Target(rule="fixed", anchor="student")).log_q[0].exp()
    assert [share for share in (q[-1], fixed[-1]) if f"{100 * share:.1f} %" not in text] == []


def test_every_message_that_the_page_about_troubles_quotes_is_one_of_the_package():
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "megatron_selfdistill").rglob("*.py"))
    messages = re.sub(r"\{[^{}\n]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", sources))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    quotes = [quote for symptom in symptoms for quote in re.findall(r"`([^`]+)`", symptom)]
    parts = {part.strip(" ,.;:()?") for quote in quotes for part in quote.split("...")} - {
        "DistNetworkError",
        "EADDRINUSE",
    }
    assert len(quotes) > 40 and {part for part in parts if part not in messages} == set()


def test_the_page_about_data_shows_every_format_and_records_that_are_read(tmp_path):
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    assert [ending for ending in FORMATS if f"{ending}`" not in text] == []
    (example,) = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    (tmp_path / "problems.jsonl").write_text(example)
    assert [problem.answer for problem in load_problems(tmp_path / "problems.jsonl").problems] == ["92", None]
    wording = len(DEFAULT_TEACHER_TEMPLATE) - len("{problem}{solution}")
    assert f"The default wording has {wording} characters" in text


def test_the_page_about_evaluation_has_every_verifier():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in BUILT_IN if f"| `{name}`" not in text] == []
