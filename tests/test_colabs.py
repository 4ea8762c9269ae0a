"""Each notebook from top to bottom: it prints the numbers that it was committed with.

All run in one process, since most of their time goes into imports. Words must be the same; a number
may differ by three times the ± behind it, by the last digit that is printed, and by the share that
the cell states as `tolerance` in its metadata, else a thousandth. What follows from a training run
states more: rounding on another processor grows along the way. Pictures must look the same from
afar (tests/pictures.py), so that one is not left behind when the drawing code changes; of runs that
diverge, which no two processes draw alike, as far as their `picture_tolerance` says.

To write the outputs anew: `jupyter execute --inplace colabs/*.ipynb`.
"""

import base64
import copy
import io
import pathlib
import re
import tomllib

import nbclient
import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from matplotlib.figure import Figure

from tests import pictures
from tests.printed import NUMBER, unit_of, words_of

TOP = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(TOP.glob("colabs/*.ipynb"))
MAX_BYTES = 300_000
SAME = 1e-3


@pytest.fixture(scope="module")
def kernel():
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)
    run_sync(manager.cleanup_resources)()


def text_of(cell):
    """What a cell prints and shows, but for pictures."""
    pieces = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            pieces.append(output.text)
        elif "image/png" not in output.get("data", {}):
            pieces.append(output.data["text/plain"])
    return "\n".join("".join(pieces).split("\n"))


def pictures_of(cell):
    """The PNGs that a cell shows."""
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def differences(committed, found, tolerance=SAME):
    """The numbers, and the words, in which two outputs differ by more than they may."""
    words = [words_of(text) for text in (committed, found)]
    if words[0] != words[1]:
        return [tuple(words)]
    different = []
    last = [None, None]
    for old, new in zip(NUMBER.finditer(committed), NUMBER.finditer(found), strict=True):
        pair = [float(match[0]) for match in (old, new)]
        if committed[: old.start()].rstrip().endswith("±"):
            # An error need not be known well, only its size.
            if not max(pair) <= 10 * min(pair) + unit_of(old[0]):
                different.append((last[0] + " ± " + old[0], last[1] + " ± " + new[0]))
            continue
        last = [old[0], new[0]]
        errors = [error_behind(text, match) for text, match in ((committed, old), (found, new))]
        allowed = 3 * max(errors) + 1.01 * unit_of(old[0]) + tolerance * max(map(abs, pair))
        if not abs(pair[0] - pair[1]) <= allowed:
            different.append((old[0], new[0]))
    return different


def error_behind(text, match):
    """The number after a ±, or 0."""
    found = re.match(rf"\s*±\s*({NUMBER.pattern})", text[match.end() :])
    return float(found[1]) if found else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_and_print_what_is_committed(path, kernel):
    committed = nbformat.read(path, as_version=4)
    notebook = copy.deepcopy(committed)
    # The names of the notebook before are no names of this one.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = nbclient.NotebookClient(notebook, timeout=300, km=kernel, coalesce_streams=True)
    client.execute()
    client.kc.stop_channels()
    widest = max(cell.metadata.get("tolerance", 0.0) for cell in committed.cells)
    for old, new in zip(committed.cells, notebook.cells[1:], strict=True):
        tolerance = old.metadata.get("tolerance", SAME)
        assert differences(text_of(old), text_of(new), tolerance) == [], old.source
        # A picture may show what any cell before has computed.
        for one, other in zip(pictures_of(old), pictures_of(new), strict=True):
            allowed = old.metadata.get("picture_tolerance", widest)
            assert pictures.difference(one, other, allowed) == "", old.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any(NUMBER.search(text_of(cell)) for cell in notebook.cells)
    assert not any(output.get("name") == "stderr" for output in shown)
    assert path.stat().st_size < MAX_BYTES


def test_pictures_are_compared_from_afar():
    """Another word, size or colour is seen, a line that moves by a hundredth of a pixel is not."""

    def draw(label="density", size=8, color="C0", shift=0.0):
        figure, image = Figure(figsize=(4, 2.5), dpi=100), io.BytesIO()
        axes = figure.subplots()
        axes.plot([0, 1 + shift, 2], [0, 1, 0.5], color=color)
        axes.set_xlabel("eigenvalue", fontsize=size)
        axes.set_ylabel(label, fontsize=size)
        figure.savefig(image)
        return image.getvalue()

    assert pictures.difference(draw(), draw(shift=1e-3)) == ""
    for other in (draw(label="weight"), draw(size=9), draw(color="C1"), draw(shift=0.2)):
        assert "% of the picture" in pictures.difference(draw(), other)
    assert pictures.difference(draw(), draw(shift=0.2), tolerance=0.2) == ""


def test_numbers_are_compared_within_their_errors():
    text = "largest 0.3490 ± 1.0e-03, mass 12.5, all converged: True"
    assert differences(text, text) == []
    assert differences(text, text.replace("0.3490", "0.3515")) == []
    assert differences(text, text.replace("0.3490", "0.3540")) == [("0.3490", "0.3540")]
    assert differences(text, text.replace("12.5", "12.6")) == []
    assert differences(text, text.replace("12.5", "12.8")) == [("12.5", "12.8")]
    assert differences(text, text.replace("12.5", "12.8"), tolerance=0.03) == []
    assert differences(text, text.replace("0e-03", "0e-05")) == [
        ("0.3490 ± 1.0e-03", "0.3490 ± 1.0e-05")
    ]
    assert len(differences(text, text.replace("True", "False"))) == 1
    assert len(differences(text, text.replace("12.5", "nan"))) == 1
    assert differences("25 products", "26 products") == [("25", "26")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_from_the_repository(path):
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    address = project["urls"]["Repository"]
    cells = nbformat.read(path, as_version=4).cells
    opens = address.replace("github.com/", "colab.research.google.com/github/") + "/blob/main"
    assert cells[0].source.startswith(f"[Open this notebook in Colab]({opens}/colabs/{path.name})")
    assert f'%pip install -q "regjax[run] @ git+{address}"' in cells[1].source
    assert cells[1].source.startswith("try:\n    import regjax\nexcept ImportError:\n")
