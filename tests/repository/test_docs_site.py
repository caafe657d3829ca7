# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The documentation's site needs no torch, has every key and method, and its links out of docs/ lead to pages."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import load_script

from megatron_selfdistill.config import command_line, keys, method_keys
from megatron_selfdistill.config.methods import method_names

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def site(request) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield load_script(REPOSITORY / "tools" / "docs_site" / "hooks.py")


def test_every_key_has_an_anchor_its_default_and_whether_a_resumed_run_may_change_it(site):
    page, rules = site.configuration.page(), site.configuration
    entries = dict(re.findall(r"^\[`([\w.]+)`\]\(#\1\)\{ #\1 \}\n:   (.*)$", page, re.MULTILINE))
    assert set(entries) == set(keys())
    for key, (default, _) in keys().items():
        assert rules.WHEN_RESUMED[rules.rule_of(key)] in entries[key]
        assert "a mapping · " in entries[key] or f"default `{rules.shown(default)}`" in entries[key]


def test_the_page_of_recipes_lists_them_as_the_command_does():
    page = (DOCS / "recipes" / "README.md").read_text(encoding="utf-8")
    listed = [line.split()[0].removeprefix("recipe=") for line in command_line.recipes().splitlines()]
    rows = re.findall(r"^\| \[(\w+)\]\((?:\.\./\.\./megatron_selfdistill/methods/)?(\w+)\.\w+\) \|", page, re.MULTILINE)
    assert [recipe for recipe, _ in rows] == listed
    files = {one: yaml.safe_load((REPOSITORY / "configs" / "recipe" / f"{one}.yaml").read_text()) for one in listed}
    pages = {one: keys.get("method", {}).get("name", "default") for one, keys in files.items() if "cluster" not in keys}
    assert rows == [(one, pages.get(one, "sizes")) for one in listed]


@pytest.mark.parametrize("name", method_names())
def test_the_page_of_a_method_has_the_parts_of_its_docstring_and_the_settings_of_its_class(site, name):
    _, parts = site.methods.taken_apart(site.methods.docstring(name))
    assert re.search(rf"recipe={name}|method\.name={name}|recipe={name}_", parts["Command"])
    read = {f"method.{one.name}": one for one in dataclasses.fields(site.methods.settings(name))}
    known = method_keys(name)
    assert list(read) == list(known)
    for key, (default, meaning) in known.items():
        assert key == "method.name" or (read[key].default, read[key].metadata["meaning"]) == (default, meaning)


def test_a_docstring_without_a_part_is_refused(site):
    with pytest.raises(ValueError, match=r"expected the parts Algorithm, .*, got Algorithm, Paper: A method\."):
        site.methods.taken_apart("A method.\n\nAlgorithm: One.\n\nPaper: None.")


def test_a_command_whose_help_fails_ends_the_build(site):
    with pytest.raises(RuntimeError, match=r"to print its help, got: .*no_such_module"):
        site.commands.help_of(("-m", "no_such_module"))


def test_every_module_of_the_reference_exists(site):
    modules = re.findall(r"^::: (\S+)$", "\n".join(site.api.pages().values()), re.MULTILINE)
    assert len(modules) > 20 and len(set(modules)) == len(modules)
    assert [name for name in modules if not (REPOSITORY / f"{name.replace('.', '/')}.py").is_file()] == []


def test_the_site_needs_neither_torch_nor_megatron(site):
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "megatron", "numpy", "transformers")))
hooks = runpy.run_path({str(REPOSITORY / "tools/docs_site/hooks.py")!r})
print(len(hooks["configuration"].page()), len(hooks["repository_pages"]()), len(hooks["methods"].pages()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tree(tmp_path) -> Path:
    """Make a repository with one page that links to everything to which a page may link."""
    for name, text in {
        "docs/guides/page.md": "[a](other.md#x) [b](../../tool.py#L3) [c](../../FILE.md#y) [d](https://x.org)\n"
        "```\n[e](../../tool.py)\n```\n[f](../../code) [g](../../missing.md) [h](#z) ![i](../i.png)\n"
        "[j](../../megatron_selfdistill/methods/own.py)\n",
        "docs/guides/other.md": "",
        "FILE.md": "[a](docs/guides/page.md#x) [b](code/one.sh)\n![c](docs/i.png)\n",
        "docs/i.png": "",
        "tool.py": "print('```')\n",
        "code/one.sh": "echo\n",
        "megatron_selfdistill/methods/own.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_home_begins_with_the_first_screen_of_the_readme_and_its_links_lead_from_the_home(site, tree):
    screen = "# T\n\n[a](docs/guides/page.md#x) [b](#y) [c](FILE.md) ![d](docs/i.png) [e](https://x.org)"
    (tree / "README.md").write_text(f"<!-- first screen -->\n{screen}\n<!-- end of the first screen -->\n# Rest\n")
    assert site.home.page("# Pages\n\n[f](guides/page.md) [g](../tool.py)\n", tree) == (
        "# T\n\n[a](guides/page.md#x) [b](repository/README.md#y) [c](repository/FILE.md) ![d](i.png) [e](https://x.org)"
        "\n\n## Pages\n\n[f](guides/page.md) [g](repository/tool.py.md)\n"
    )


def test_links_out_of_docs_lead_to_pages_of_the_site(site, tree):
    text, outside = site.links.rewritten((tree / "docs/guides/page.md").read_text(), "docs/guides/page.md", tree)
    assert text.split("\n") == [
        "[a](other.md#x) [b](../repository/tool.py.md) [c](../repository/FILE.md#y) [d](https://x.org)",
        *("```", "[e](../../tool.py)", "```"),
        "[f](../repository/code/index.md) [g](../../missing.md) [h](#z) ![i](../i.png)",
        "[j](../recipes/own.md)",
        "",
    ]
    assert outside == ["tool.py", "FILE.md", "code"]


def test_a_file_that_a_page_leads_to_is_a_page_with_links_of_its_own(site, tree):
    made = site.links.linked_files(["docs/guides/page.md"], tree)
    assert set(made) == {f"repository/{name}.md" for name in ("tool.py", "FILE", "code/index", "code/one.sh")}
    assert made["repository/FILE.md"] == "[a](../guides/page.md#x) [b](code/one.sh.md)\n![c](../i.png)\n"
    assert "# tool.py\n\n````python\nprint('```')\n\n````\n" in made["repository/tool.py.md"]
    assert made["repository/code/index.md"].endswith("# code\n\n- `one.sh`\n")
