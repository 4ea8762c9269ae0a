"""The README and the pages of docs are true: their code runs and prints what they show.

Their commands and options exist, and their links lead somewhere. The mark `<!-- test-command -->`
in the README stands before the block of one shell line that sets up and runs the tests, which CI
reads.
"""

import importlib
import importlib.util
import pathlib
import re
import shlex
import tomllib

import pytest

from regjax.__main__ import main
from tests import pages, pictures
from tests.test_architecture import ROOMS

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*ROOT.glob("*.md"), ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")]
}
# Whose code has a test of its own, which knows what it assumes.
OWN_TEST = re.compile(r"docs/(frameworks|guides/new_transformation|papers/\w+)\.md")
WITH_CODE = [
    name for name, text in PAGES.items() if "```python" in text and not OWN_TEST.fullmatch(name)
]


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


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


def broken_links(name, text):
    """The links of a page to files or headings that do not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        is_there = path.exists() and (
            not anchor or path.suffix != ".md" or anchor in anchors(path.read_text())
        )
        found += [] if is_there else [target]
    return found


SAMPLE = """
# One `heading`, and another
```bash
python3 -m venv .venv && \\
  PATH=x python -m regjax spectrum --out 'a b'  # words
```
[here](#one-heading-and-another) [there](https://x) [nowhere](tests/nothing.py) [no](#part)
"""


def test_the_readers_find_what_they_look_for():
    assert module_runs(SAMPLE) == [
        ("venv", [".venv"]),
        ("regjax", ["spectrum", "--out", "a b"]),
    ]
    assert anchors(SAMPLE) == {"one-heading-and-another"}


def test_links_that_lead_nowhere_are_found():
    broken = ["tests/nothing.py", "#part"]
    assert broken_links("README.md", SAMPLE) == ["#one-heading-and-another", *broken]


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a 1.24 ± 3e-05\n", "a  1.25\n ± 2e-05\n", True),
        ("a 1.23\n", "a 1.25\n", False),
        ("a 5\n", "a 6\n", False),
        ("a 1.0\n", "b 1.0\n", False),
        ("a 1.0 and 2.0\n", "a 1.0\n", False),
        ("", "a\n", False),
        ("ValueError: must be 3, got 5\n", "ValueError: must be ...\n", True),
        ("TypeError: must be 3, got 5\n", "ValueError: must be ...\n", False),
    ],
)
def test_outputs_are_compared(printed, shown, same):
    assert (pages.differences(printed, shown) == []) == same


@pytest.mark.parametrize("output", ["", "\n```text\n2\n```\n", "\n```text\nKeyError: 1\n```\n"])
def test_a_page_that_shows_something_else_is_refused(output):
    with pytest.raises(AssertionError):
        pages.check(f"```python\nprint(1)\n```\n{output}", "page")


def test_outputs_are_written_into_a_page():
    page = "```python\nprint(1.23)\nraise KeyError(4)\n```\n\n```text\nold\n```\n\nmore\n"
    written = pages.with_outputs(page, "page")
    assert written == page.replace("old", "1.23\nKeyError: 4")
    pages.check(written, "page")


@pytest.mark.parametrize("name", WITH_CODE)
def test_python_blocks_run_and_print_what_is_shown(name, tmp_path, monkeypatch, default_promotion):
    monkeypatch.chdir(tmp_path)
    pages.check(PAGES[name], name)
    # The first picture that a page writes is the first that it shows.
    for drawn, shown in zip(sorted(tmp_path.glob("*.png")), pictures_of(name), strict=False):
        assert pictures.difference(shown.read_bytes(), drawn.read_bytes()) == ""


def pictures_of(name):
    paths = re.findall(r"!\[[^\]]*\]\((\S+\.png)\)", PAGES[name])
    return [(ROOT / name).parent / path for path in paths]


def test_the_quickstart_shows_what_it_draws():
    name = "docs/quickstart.md"
    assert PAGES[name].count(".savefig(") == len(pictures_of(name)) == 1


def test_the_network_of_the_guides_is_one():
    """Of what the pages fold away there is one text, so that all numbers are of one problem."""
    folded = [
        re.findall(r"<details>.*?</details>", text, re.DOTALL)
        for name, text in PAGES.items()
        if name.startswith("docs/guides/")
    ]
    assert len({block for found in folded for block in found}) == 1
    assert max(map(len, folded)) == 1


def test_the_printed_table_has_the_rows_of_the_command():
    """The words of each row are in the code of the command; numbers are those of one run."""
    (table,) = [block for block in blocks(README, "text") if "accuracy" in block]
    code = "".join(path.read_text() for path in (ROOT / "regjax/experiments").glob("*.py"))
    rows = [re.match(r" +([a-z]+(?: [a-z]+)*)", line) for line in table.splitlines()]
    words = [row[1] for row in rows if row]
    assert {"eigenvalue", "eigenvalues above", "trace"} <= set(words)
    assert [word for word in words if word not in code] == []


def test_the_test_command_is_one_line_that_does_everything():
    (block,) = re.findall(r"<!-- test-command -->\s*```bash\n(.*?)```", README, re.DOTALL)
    assert block.count("\n") == 1
    for part in ("python3 -m venv", "pip install", "[test]", "-c constraints.txt", "-m pytest"):
        assert part in block


def test_shell_commands_exist():
    runs = [run for text in PAGES.values() for run in module_runs(text)]
    assert {"regjax", "pytest"} <= {module for module, _ in runs}
    assert [module for module, _ in runs if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize(
    "words",
    [words for text in PAGES.values() for module, words in module_runs(text) if module == "regjax"],
)
def test_command_line_options_exist(words, capsys):
    assert main([*words, "--help"]) == 0
    known = capsys.readouterr().out
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


def test_extras_and_files_of_the_commands_exist():
    script = "\n".join(blocks(README, "bash", "sh", "console"))
    extras = re.findall(r"(?:\.|regjax)\[([\w,]+)\]", script)
    assert extras
    known = PYPROJECT["project"]["optional-dependencies"]
    assert {name for group in extras for name in group.split(",")} <= set(known)
    for name in re.findall(r"-c (\S+\.txt)", script):
        assert (ROOT / name).is_file()


def test_pip_installs_from_the_repository_of_the_project():
    addresses = re.findall(r"git\+(https://\S+?)\"", "".join(PAGES.values()))
    assert set(addresses) == {PYPROJECT["project"]["urls"]["Repository"]}


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_and_headings_resolve(name):
    assert broken_links(name, PAGES[name]) == []


# What one reads from a function, or is refused by, is described where it comes from.
RETURNED = re.compile(r"(Result|State|Error|_solver|Panel|Settings)$|^Interrupted$")


def listed_names():
    """{room: names} of the tables of docs/methods.md."""
    sections = PAGES["docs/methods.md"].split("\n## ")[1:]
    return {
        section.split(":")[0]: re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        for section in sections
    }


@pytest.mark.parametrize("room", listed_names())
def test_all_public_names_are_listed(room):
    module = importlib.import_module("regjax" if room == "regjax" else f"regjax.{room}")
    public = [name for name in module.__all__ if callable(getattr(module, name))]
    assert sorted(listed_names()[room]) == sorted(n for n in public if not RETURNED.search(n))


def test_every_room_is_listed():
    assert set(listed_names()) == {"regjax", *ROOMS}
