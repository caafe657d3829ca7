# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The documentation's site has every page, key, command and module, and its links out of docs/ lead to pages."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import load_script

from megatron_selfdistill import cli
from megatron_selfdistill.config import command_line, key_list, keys
from megatron_selfdistill.config.methods import method_names

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
WIDTH = 100
"""The characters of a line of code in a window of 1280 px: Chromium shows 105 with tools/docs_site/site.css."""


@pytest.fixture(scope="module")
def site(request) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield load_script(REPOSITORY / "tools" / "docs_site" / "hooks.py")


@pytest.fixture(scope="module")
def reference(site) -> dict[str, str]:
    return site.reference()


def pages_of(entry: Any) -> Iterator[str]:
    """Yield every page that a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
    else:
        for one in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(one)


def test_the_navigation_has_every_page_once_and_no_other(site, reference):
    named = list(pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    generated = {*reference, *(site.links.site_path(name, REPOSITORY) for name in site.IN_NAVIGATION)}
    assert sorted(named) == sorted(written | generated)


def test_the_build_fails_where_a_page_a_link_or_an_anchor_is_missing():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    found = [level for kind in settings["validation"].values() for level in kind.values()]
    assert settings["strict"] is True and found == ["warn"] * 7


def formula_lines(text: str) -> Iterator[str]:
    """Yield the lines of the blocks without a language that define something, by a line "name = value"."""
    fence = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    fenced = [block for language, block in fence.findall(text) if not language]
    indented = re.findall(r"\n\n((?: {4}\S.*\n)+)", fence.sub("", text))
    for block in (*fenced, *indented):
        if re.search(r"^ *\w[\w ():,]{,39} = ", block, re.MULTILINE):
            yield from block.splitlines()


def test_no_formula_is_wrapped_in_a_window_of_1280_pixels():
    lines = [(path.name, line) for path in DOCS.rglob("*.md") for line in formula_lines(path.read_text())]
    assert ("method.md", "p    = softmax(s)                     the student; at the start of the run s = r") in lines
    assert [(name, line) for name, line in lines if len(line) > WIDTH] == []


def test_the_site_has_its_style(site):
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    style = (REPOSITORY / "tools" / "docs_site" / "site.css").read_text()
    assert settings["extra_css"] == [site.STYLE] and "white-space: pre-wrap" in style


def test_every_key_has_an_anchor_its_default_and_whether_a_resumed_run_may_change_it(site, reference):
    page, rules, mappings = reference["reference/configuration.md"], site.configuration, key_list.entries()
    entries = dict(re.findall(r"^\[`([\w.]+)`\]\(#\1\)\{ #\1 \}\n:   (.*)$", page, re.MULTILINE))
    assert list(entries) == [key for key in keys() if key in entries] and set(entries) == set(keys())
    for key, (default, _) in keys().items():
        assert rules.WHEN_RESUMED[rules.rule_of(key)] in entries[key]
        expected = "a mapping · " if key in mappings else f"default `{rules.shown(default)}`"
        assert expected in entries[key]
    of_mappings = [(name, one) for part in mappings.values() for name, one in part.items()]
    assert len(of_mappings) > 10
    for name, (default, doc) in of_mappings:
        assert re.search(rf"^    `{name}` \(.*, default `{re.escape(rules.shown(default))}`\): ", page, re.MULTILINE), (
            doc
        )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "rollout.transfer",
            "`shared_memory`, `gloo`, `nccl`, `ipc` or null · default `null` · a resumed run may change",
        ),
        ("loss.divergence", "`reverse_kl`, `forward_kl`, `jsd` · default `reverse_kl` · a resumed run keeps it"),
        ("teacher.weights", "`frozen`, `ema`, `current` · default `frozen` · a run never changes it"),
        (
            "evaluation.verifier",
            "`math_verify`, `exact_match`, a dotted path · default `math_verify` · a resumed run keeps it if it "
            "trains on verdicts",
        ),
        (
            "model.vocab_size",
            "a whole number, at least 1 and at most 2147483647, or null · default `null` · a resumed run keeps",
        ),
        (
            "rollout.stop_token_ids",
            "a list, each a whole number, at least 0 and at most 2147483647 · default `[]` · a resumed run keeps it",
        ),
    ],
)
def test_an_entry_has_type_choices_default_and_rule(reference, key, words):
    assert f"{{ #{key} }}\n:   {words}" in reference["reference/configuration.md"]


def test_items_with_another_rule_than_their_key_are_listed(reference):
    _, _, entry = reference["reference/configuration.md"].partition("{ #model.transformer }")
    assert "For these items a resumed run may change it: `account_for_embedding_in" in entry.partition("\n[`")[0]


def test_every_recipe_is_named_with_a_whole_sentence(reference):
    rows = dict(re.findall(r"^\| `recipe=(\w+)` \| (.*) \|$", reference["reference/configuration.md"], re.MULTILINE))
    assert set(rows) == {file.stem for file in (REPOSITORY / "configs" / "recipe").glob("*.yaml")}
    assert [row for row in rows.values() if not row.endswith(".") or row.endswith("...")] == []


def test_the_page_of_recipes_lists_them_as_the_command_does():
    page = (DOCS / "recipes" / "README.md").read_text(encoding="utf-8")
    listed = [line.split()[0].removeprefix("recipe=") for line in command_line.recipes().splitlines()]
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \|", page, re.MULTILINE)
    assert [recipe for recipe, _ in rows] == listed
    files = {one: yaml.safe_load((REPOSITORY / "configs" / "recipe" / f"{one}.yaml").read_text()) for one in listed}
    pages = {one: keys.get("method", {}).get("name", "default") for one, keys in files.items() if "cluster" not in keys}
    assert rows == [(one, pages.get(one, "sizes")) for one in listed]


@pytest.fixture(scope="module")
def methods(site) -> Any:
    """Return the script that makes the pages of the methods."""
    return load_script(REPOSITORY / "tools" / "docs_site" / "methods.py")


def test_the_pages_of_the_methods_are_those_of_their_docstrings(methods):
    different = [path for path, text in methods.pages().items() if (REPOSITORY / path).read_text() != text]
    assert different == [], "python tools/docs_site/methods.py writes the pages anew"


@pytest.mark.parametrize("name", method_names())
def test_the_docstring_of_a_method_is_its_page_in_short(methods, name):
    text = methods.docstring(name)
    _, parts = methods.taken_apart(text)
    assert len(text.splitlines()) <= 60 and len(parts["Algorithm"].splitlines()) <= 5
    assert re.search(rf"recipe={name}|method\.name={name}|recipe={name}_", parts["Command"])


def test_a_docstring_without_a_part_is_refused(methods):
    with pytest.raises(ValueError, match=r"expected the parts Algorithm, .*, got Algorithm, Paper: A method\."):
        methods.taken_apart("A method.\n\nAlgorithm: One.\n\nPaper: None.")


def test_a_part_becomes_markdown(methods):
    text = "With docs/data.md:\n\n    a = 1\n      b\n\n- c"
    assert methods.markdown(text) == "With [Data](../data.md):\n\n```\na = 1\n  b\n```\n\n- c"


def test_a_doc_comment_is_shown_as_it_is_written(site):
    assert site.configuration.escaped("4 * a_b, <x>, `c * d_e`, ``f_g``") == r"4 \* a\_b, &lt;x>, `c * d_e`, ``f_g``"


def test_every_command_shows_its_help_and_that_of_its_subcommands(reference):
    page = reference["reference/commands.md"]
    for name in cli.COMMANDS:
        assert f"\n## selfdistill {name}\n\n```text\nusage: selfdistill {name} " in page
    for name in ("convert hf-to-megatron", "convert megatron-to-hf", "convert inspect", "evaluate compare"):
        assert f"\n### selfdistill {name}\n\n```text\nusage: selfdistill {name} " in page


def test_a_command_whose_help_fails_ends_the_build(site):
    with pytest.raises(RuntimeError, match=r"to print its help, got: .*no_such_module"):
        site.commands.help_of(("-m", "no_such_module"))


def test_every_module_of_the_reference_exists_and_is_documented(reference):
    modules = re.findall(r"^::: (\S+)$", "\n".join(reference.values()), re.MULTILINE)
    assert len(modules) > 20 and len(set(modules)) == len(modules)
    assert [name for name in modules if not (REPOSITORY / f"{name.replace('.', '/')}.py").is_file()] == []


def test_the_site_needs_neither_torch_nor_megatron(site):
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "megatron", "numpy", "transformers")))
hooks = runpy.run_path({str(REPOSITORY / "tools/docs_site/hooks.py")!r})
print(len(hooks["configuration"].page()), len(hooks["repository_pages"]()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tree(tmp_path) -> Path:
    """Make a repository with one page that links to everything to which a page may link."""
    for name, text in {
        "docs/guides/page.md": "[a](other.md#x) [b](../../tool.py#L3) [c](../../FILE.md#y) [d](https://x.org)\n"
        "```\n[e](../../tool.py)\n```\n[f](../../code) [g](../../missing.md) [h](#z) ![i](../i.png)\n",
        "docs/guides/other.md": "",
        "FILE.md": "[a](docs/guides/page.md#x) [b](code/one.sh)\n![c](docs/i.png)\n",
        "docs/i.png": "",
        "tool.py": "print('```')\n",
        "code/one.sh": "echo\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_home_begins_with_the_first_screen_of_the_readme(site):
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    home = site.home.page(index, REPOSITORY)
    screen, _, tables = home.partition("\n\n## Documentation\n")
    assert screen.startswith("# megatron_selfdistill\n") and "\n```\n" in screen
    assert site.links.rewritten(index, "docs/README.md", REPOSITORY)[0] == f"# Documentation\n{tables}"
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", screen) if ":" not in target]
    made = {*site.repository_pages(), *(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*"))}
    assert targets and set(targets) <= made


def test_links_of_the_first_screen_lead_from_the_home(site, tree):
    screen = "# T\n\n[a](docs/guides/page.md#x) [b](#y) [c](FILE.md) ![d](docs/i.png) [e](https://x.org)"
    (tree / "README.md").write_text(f"<!-- first screen -->\n{screen}\n<!-- end of the first screen -->\n# Rest\n")
    assert site.home.page("# Pages\n\n[f](guides/page.md) [g](../tool.py)\n", tree) == (
        "# T\n\n[a](guides/page.md#x) [b](repository/README.md#y) [c](repository/FILE.md) ![d](i.png) [e](https://x.org)"
        "\n\n## Pages\n\n[f](guides/page.md) [g](repository/tool.py.md)\n"
    )


@pytest.mark.parametrize(
    "text", ["# T", "<!-- end of the first screen --><!-- first screen -->", "<!-- first screen -->"]
)
def test_a_readme_without_a_first_screen_ends_the_build(site, tree, text):
    (tree / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"expected the lines <!-- first screen --> and .* once each in README\.md"):
        site.home.page("", tree)


def test_links_out_of_docs_lead_to_pages_of_the_site(site, tree):
    text, outside = site.links.rewritten((tree / "docs/guides/page.md").read_text(), "docs/guides/page.md", tree)
    assert text.split("\n") == [
        "[a](other.md#x) [b](../repository/tool.py.md) [c](../repository/FILE.md#y) [d](https://x.org)",
        *("```", "[e](../../tool.py)", "```"),
        "[f](../repository/code/index.md) [g](../../missing.md) [h](#z) ![i](../i.png)",
        "",
    ]
    assert outside == ["tool.py", "FILE.md", "code"]


def test_a_file_that_a_page_leads_to_is_a_page_with_links_of_its_own(site, tree):
    made = site.links.linked_files(["docs/guides/page.md"], tree)
    assert set(made) == {f"repository/{name}.md" for name in ("tool.py", "FILE", "code/index", "code/one.sh")}
    assert made["repository/FILE.md"] == "[a](../guides/page.md#x) [b](code/one.sh.md)\n![c](../i.png)\n"
    assert "# tool.py\n\n````python\nprint('```')\n\n````\n" in made["repository/tool.py.md"]
    assert made["repository/code/index.md"].endswith("# code\n\n- `one.sh`\n")
