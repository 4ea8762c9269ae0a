"""Pages of text whose Python blocks run one after the other and print what stands below them.

A block marked `text` right below a block of Python is its output: what it prints, or the error with
which it ends. `python -m tests.pages PAGE ...` runs pages and writes the outputs into them.
"""

import contextlib
import io
import pathlib
import re
import sys
import tempfile
import textwrap

from tests.printed import NUMBER, unit_of, words_of

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_WIDTH = 96


def run(code, where, namespace):
    """(what a block prints, the error that ends it or None); the error is the last line."""
    printed, ended_by = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, where, "exec"), namespace)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=printed)
        ended_by = error
    return _ADDRESS.sub("", printed.getvalue()), ended_by


def differences(printed, shown):
    """What differs, in pairs: words at all, numbers by more than one in the last place shown.

    Whole numbers are words. Spaces and the ends of lines do not count, nor what comes after a
    final "...".
    """
    if shown.endswith(" ...\n"):
        shown = shown.removesuffix(" ...\n")
        printed = " ".join(printed.split()[: len(shown.split())])
    words, others = words_of(printed), words_of(shown)
    if words != others:
        return [(printed, shown)]
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return [pair for pair in pairs if not _is_close(*pair)]


def _is_close(ours, theirs):
    # A unit of the last place, and what is lost where decimals become floating point.
    return abs(float(ours) - float(theirs)) <= unit_of(theirs) * (1 + 1e-6)


def check(text, name):
    """Runs a page; a wrong output, or one that is not shown, is an AssertionError."""
    namespace = {"__name__": name}
    for number, (code, shown) in enumerate(_BLOCK.findall(text), 1):
        where = f"{name}, Python block {number}"
        printed, error = run(code, where, namespace)
        if error is not None and f"{type(error).__name__}: " not in shown:
            raise error
        if different := differences(printed, shown):
            raise AssertionError(f"{where}, printed and shown: {different}")


def with_outputs(text, name):
    """Runs a page and puts below each block what it prints; what is close enough stays."""
    namespace = {"__name__": name}

    def block(match):
        code, shown = match.groups()
        printed, _ = run(code, name, namespace)
        if differences(printed, shown or "") == []:
            return match.group()
        wrapped = [part for line in printed.splitlines() for part in textwrap.wrap(line, _WIDTH)]
        output = "\n```text\n" + "\n".join(wrapped) + "\n```\n" if wrapped else ""
        return f"```python\n{code}```\n{output}"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page = pathlib.Path(argument).absolute()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            page.write_text(with_outputs(page.read_text(), argument))
