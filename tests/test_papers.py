"""The papers' pages: they show the recorded verdicts, and what their snippets call is there."""

import ast
import inspect
import json
import re

import pytest

import regjax
from benchmarks import _papers
from regjax import (
    curvature,
    diagnostics,
    initializers,
    models,
    normalization,
    plots,
    pruning,
    regularizers,
    schedules,
    transforms,
)
from tests.printed import unit_of

ROOMS = {
    "regjax": regjax,
    "curvature": curvature,
    "diagnostics": diagnostics,
    "initializers": initializers,
    "models": models,
    "normalization": normalization,
    "plots": plots,
    "pruning": pruning,
    "regularizers": regularizers,
    "schedules": schedules,
    "transforms": transforms,
}
PAGES = {
    path.stem: path.read_text() for path in sorted((_papers.ROOT / _papers.PAGES).glob("*.md"))
}
INDEX = PAGES.pop("index")
SECTIONS = ["Formula", "API", "Fidelity", "Evidence"]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
ENTRIES = json.loads((_papers.ROOT / _papers.RESULTS / "claims.json").read_text())


def test_the_tables_agree_with_the_recorded_verdicts():
    for path, wanted in _papers.files():
        assert path.read_text() == wanted, (
            f"{path.name} and claims.json differ: `python -m benchmarks claims --summary`."
        )


def test_every_verdict_is_counted_once():
    pages = [_papers.read_page(name, text) for name, text in PAGES.items()]
    claims = [claim for page in pages for claim in page.claims]
    assert sorted(claims) == sorted(ENTRIES)
    rows = re.findall(r"^\| \[.*$", _papers.matrix(pages, ENTRIES), re.MULTILINE)
    cells = [cell.strip() for row in rows for cell in row.split("|")[2:5]]
    found = dict.fromkeys(_papers.MARKS.values(), 0)
    for mark, count in re.findall(r"([✓✗\u2013·])\u2060?(\d*)", " ".join(cells)):
        found[mark] += int(count or 1)
    recorded = dict.fromkeys(_papers.MARKS.values(), 0)
    for entry in ENTRIES.values():
        for verdict in entry["verdicts"]:
            word = next(w for w in _papers.MARKS if verdict["verdict"].startswith(w))
            recorded[_papers.MARKS[word]] += 1
    assert found == recorded


def test_verdicts_are_taken_apart():
    text = "not testable at this size, it stopped (digits, rate 0.1): |g| falls (twice)"
    (found,) = _papers.verdicts({"verdicts": [{"verdict": text, "evidence": "1 < 2"}]})
    assert found.word == "not testable at this size"
    assert found.words == "not testable at this size, it stopped"
    assert (found.data, found.part) == ("digits", "rate 0.1: |g| falls (twice)")
    assert _papers.symbols([found]) == "\N{EN DASH}"
    assert (
        _papers.symbols([found, found._replace(word="reproduced")]) == "✓\u20601 \N{EN DASH}\u20601"
    )
    with pytest.raises(ValueError, match="must begin with"):
        _papers.verdicts({"verdicts": [{"verdict": "confirmed (digits)", "evidence": ""}]})


HEADLINES = {
    "ten largest eigenvalues over the bare": [("curvature/top10_mlp", "regjax")],
    "Hessian product over gradient: perceptron": [
        ("curvature/product_mlp", "recomputed"),
        ("curvature/product_resnet", "recomputed"),
    ],
    "Lanczos step": [("curvature/lanczos", "step beyond its product")],
    "trace error": [("curvature/density", "trace error deflated / plain")],
    "eigenpairs with checkpoints": [("checkpoint/top10_mlp", "every 10 products")],
    "data from disk": [
        ("scaling/stream_mlp_16384", "streamed"),
        ("scaling/stream_resnet_512", "streamed"),
    ],
    "SAM step": [
        ("transforms/steps_mlp_32", "sam"),
        ("transforms/steps_mlp_128", "sam"),
        ("transforms/steps_resnet_128", "sam"),
        ("transforms/steps_resnet_32", "sam"),
    ],
    "`coherent_regularization`": [
        ("transforms/steps_mlp_32", "coherent_regularization"),
        ("transforms/steps_mlp_128", "coherent_regularization"),
        ("transforms/steps_resnet_32", "coherent_regularization"),
    ],
    "BatchNorm over": [
        ("normalization/batch_64x28x28x32", "BatchNorm"),
        ("normalization/batch_128x8x8x128", "BatchNorm"),
    ],
    "refresh": [("transforms/refresh_mlp_1024", "refresh")],
}
"""Row of the headline table -> the recorded ratios or facts that it shows, in its order."""


@pytest.mark.parametrize("row", HEADLINES)
def test_the_headline_speeds_are_the_recorded_ones(row):
    lines = (_papers.ROOT / _papers.RESULTS / "speed_cpu.jsonl").read_text().splitlines()
    records = {record["case"]: record for record in map(json.loads, lines)}
    (line,) = re.findall(
        rf"^\| {re.escape(row)}.*$", (_papers.ROOT / _papers.MATRIX).read_text(), re.MULTILINE
    )
    _, _, measured, bars, verdict, _ = (cell.strip() for cell in line.split("|"))
    met = []
    shown = []
    for case, name in HEADLINES[row]:
        record = records[case]
        value = (
            record["facts"][name] if name in record["facts"] else record["ratios"][name]["median"]
        )
        digits = max(len(found.split(".")[1]) for found in re.findall(r"\d\.\d+", measured))
        shown.append(f"{value:.{digits}f}")
        met.append(value <= record["bars"][name])
        assert f"{record['bars'][name]:.2f}" in bars
    assert re.findall(r"\d\.\d+", measured) == shown
    assert verdict == ("met" if all(met) else "missed, met" if any(met) else "missed")


SPECTRA = ("flat", "polynomial", "exponential", "step")


@pytest.mark.parametrize("kind", ["trace", "diagonal"])
def test_the_errors_of_estimators_are_the_recorded_ones(kind):
    lines = (_papers.ROOT / _papers.RESULTS / "speed_cpu.jsonl").read_text().splitlines()
    facts = {record["case"]: record["facts"] for record in map(json.loads, lines)}
    page = (_papers.ROOT / "docs/benchmarks/curvature.md").read_text()
    (table,) = re.findall(rf"^\| {kind} \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert len(rows) == 7
    for label, *cells in rows:
        for spectrum, cell in zip(SPECTRA, cells, strict=True):
            found = facts[f"estimators/{kind}_{spectrum}"]
            error, share = cell.split(" / ")
            assert abs(float(error) - found[f"{label} error"]) <= 0.51 * unit_of(error)
            estimated = found.get(f"{label} estimated / true error")
            assert share == ("-" if estimated is None else f"{estimated:.2f}")


def test_the_groups_hold_every_page_once():
    grouped = [name for names in _papers.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_its_parts_in_order(name):
    text = PAGES[name]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert re.match(r"# .+\n\n.+?\(\d{4}\),\n?", text)
    assert text.index("**Claim.** ") < text.index("**Found here.** ") < text.index("## Formula")
    assert re.search(r"(?:arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/|SIAM Journal)", text)
    for claim in _papers.read_page(name, text).claims:
        figure = f"../../{_papers.RESULTS}/claim_{claim}.png"
        assert re.search(rf"!\[[^\]]{{20,}}\]\({figure}\)\n\n\*[A-Z][^*]{{40,}}\*\n", text), claim
        assert (_papers.ROOT / _papers.PAGES / figure).resolve().exists()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_links_to_what_exists(name):
    folder = _papers.ROOT / _papers.PAGES
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", PAGES[name]):
        assert (folder / target).resolve().exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_a_snippet_calls_what_there_is(name):
    (preamble,) = SNIPPET.findall(INDEX)
    (snippet,) = SNIPPET.findall(PAGES[name])
    known = _assigned(ast.parse(preamble)) | {"print", "len", "tuple"}
    tree = ast.parse(snippet)
    assert len(tree.body) <= 7, "a snippet is a few lines"
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert used <= known | _assigned(tree), used - known - _assigned(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := _named(node.func)) is not None:
            _bind(function, node)
    for names in re.findall(r"`((?:\w+\.)+\w+)`", _papers.read_page(name, PAGES[name]).names):
        assert _named(ast.parse(names).body[0].value) is not None, names


def _assigned(tree):
    """Names that a piece of code binds."""
    found = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    found |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    found |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def _named(node):
    """What `room.name` stands for, None for what belongs to no room; a missing name raises."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in ROOMS:
        return None
    found = ROOMS[node.id]
    for part in reversed(parts):
        found = getattr(found, part)
    return found


def _bind(function, call):
    """Raises TypeError unless the function takes these arguments."""
    signature = inspect.signature(function)
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    signature.bind(*call.args, **{word.arg: word.value for word in call.keywords})
