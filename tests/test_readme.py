"""The README is true: its code runs, its commands exist, its links and method index resolve.

Marks in the README that the tests read: `<!-- test-command -->` before the block of one shell line
that sets up and runs the tests, and the table of methods with the columns paper, name and room.
"""

import importlib
import importlib.util
import pathlib
import re
import shlex
import tomllib

import pytest

from regjax.__main__ import main

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def blocks(text, *languages):
    """The contents of the fenced blocks of `text` in one of `languages`."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The words of every command of the shell blocks, split at && and at the ends of lines."""
    script = "\n".join(blocks(text, "bash", "sh", "console")).replace("\\\n", " ")
    parts = re.split(r"&&|;|\n", script)
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def module_runs(text):
    """(module, its arguments) of every `python -m module arguments` of the shell blocks."""
    return [
        (words[i + 1], words[i + 2 :])
        for words in commands(text)
        for i in range(len(words) - 1)
        if words[i] == "-m" and "python" in words[i - 1]
    ]


def method_index(text):
    """(name, room) of every row of the method table; a row may have several names."""
    header = re.search(r"^\|\s*paper\s*\|\s*name\s*\|\s*room\s*\|\n", text, re.I | re.M)
    rows = []
    for line in text[header.end() :].splitlines()[1:]:
        if not line.startswith("|"):
            break
        _, names, room = (cell.strip() for cell in line.strip("|").split("|"))
        rows += [(name, room.strip("`/")) for name in re.findall(r"`([^`]+)`", names)]
    return rows


SAMPLE = """
```bash
python3 -m venv .venv && \\
  PATH=x python -m regjax spectrum --out 'a b'  # words
```
| paper | name | room |
|---|---|---|
| Someone (2020) | `one`, `two` | `curvature/` |

| `not` | `a` | `row` |
"""


def test_the_readers_find_what_they_look_for():
    assert module_runs(SAMPLE) == [
        ("venv", [".venv"]),
        ("regjax", ["spectrum", "--out", "a b"]),
    ]
    assert method_index(SAMPLE) == [("one", "curvature"), ("two", "curvature")]


def test_python_blocks_run_in_order(tmp_path, monkeypatch, default_promotion):
    monkeypatch.chdir(tmp_path)
    code = blocks(README, "python")
    assert code
    namespace = {"__name__": "readme"}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


def test_the_test_command_is_one_line_that_does_everything():
    (block,) = re.findall(r"<!-- test-command -->\s*```bash\n(.*?)```", README, re.DOTALL)
    assert block.count("\n") == 1
    for part in ("python3 -m venv", "pip install", "[test]", "-c constraints.txt", "-m pytest"):
        assert part in block


def test_shell_commands_exist():
    runs = module_runs(README)
    assert {"regjax", "pytest"} <= {module for module, _ in runs}
    assert [module for module, _ in runs if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize(
    "words", [words for module, words in module_runs(README) if module == "regjax"]
)
def test_command_line_options_exist(words, capsys):
    assert main([*words, "--help"]) == 0
    known = capsys.readouterr().out
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


def test_extras_and_files_of_the_commands_exist():
    script = "\n".join(blocks(README, "bash", "sh", "console"))
    extras = re.findall(r"\.\[([\w,]+)\]", script)
    assert extras
    known = PYPROJECT["project"]["optional-dependencies"]
    assert {name for group in extras for name in group.split(",")} <= set(known)
    for name in re.findall(r"-c (\S+\.txt)", script):
        assert (ROOT / name).is_file()


def test_links_to_files_resolve():
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README)]
    files = [target for target in targets if target and "://" not in target]
    assert [target for target in files if not (ROOT / target).exists()] == []


@pytest.mark.parametrize(("name", "room"), method_index(README))
def test_method_index_resolves(name, room):
    assert callable(getattr(importlib.import_module(f"regjax.{room}"), name))
