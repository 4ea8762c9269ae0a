"""The papers' pages and their tables, written from the recorded verdicts.

The prose stands in docs/papers/<page>.md, one file for each paper. The verdicts stand in
results/claims.json. Whatever shows verdicts is written from both, between marks in the files:
the matrix in benchmarks/README.md, the index of the pages, and the evidence on each page.
"""

import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = "benchmarks/results"
MATRIX, INDEX, PAGES = "benchmarks/README.md", "docs/papers/index.md", "docs/papers"

MARKS = {
    "reproduced": "✓",
    "not reproduced": "✗",
    "not testable at this size": "\N{EN DASH}",
    "reported": "·",
}
DATA = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
_OTHER_DATA = {
    "valley": "a valley in 21 dimensions",
    "linear": "deep linear networks",
    "moons": "two moons",
    "one_dimensional": "functions of one variable",
}
# Networks of a claim that has digits alone.
_ON_DIGITS = ("softmax regression", "perceptron")
GROUPS = {
    "Sharpness and flat minima": (
        "sam", "gsam", "max_eigenvalue", "entropy_sgd", "spherical_sharpness", "variance_flatness",
        "weight_averaging", "loss_surfaces",
    ),
    "Noise": ("weight_noise", "anticorrelated_noise", "dropout", "noise_scale"),
    "Normalization": (
        "batch_norm", "landscape_smoothness", "batch_norm_tuning", "group_norm_plus", "weight_norm",
        "weight_rescaling", "spline_partition",
    ),
    "Initialisation and very deep networks": ("gradinit", "batch_entropy"),
    "Regularisation": (
        "geometric_complexity", "gradient_coherence", "low_dimensional", "sparse_recovery",
    ),
    "Curvature": (
        "batch_curvature", "block_structure", "tangent_kernel", "spectral_density",
        "top_eigenpairs",
    ),
    "Training dynamics": (
        "edge_of_stability", "adaptive_edge", "critical_sharpness", "gradient_subspace",
    ),
    "Pruning": ("taylor_importance", "redundancy"),
    "Decentralised training": ("decentralized",),
    "Linear systems": ("influence",),
}  # fmt: skip
"""Group -> its pages, in the order in which the tables show them."""

_VERDICT = re.compile(
    r"(not reproduced|reproduced|not testable at this size|reported)([^(:]*?)"
    r"(?: \(([^)]*)\))?(?:: (.*))?"
)
_CLAIM = re.compile(r"<!-- claim: (\w+) -->\n(.*?)<!-- end of claim -->", re.DOTALL)


class Verdict(NamedTuple):
    """A recorded verdict, taken apart.

    Attributes:
      word: one of `MARKS`.
      words: all that is said of it, such as "not testable at this size".
      data: "digits", "fashion_mnist", another word, or "" where there is none.
      part: what was tested, with the setting in front.
      evidence: the numbers.
    """

    word: str
    words: str
    data: str
    part: str
    evidence: str


class Page(NamedTuple):
    """What the tables say of a page.

    Attributes:
      name: of its file. title: its heading. paper: authors and year.
      names: the public names. fidelity: what it was implemented from. found: in a sentence.
      claims: names in claims.json.
    """

    name: str
    title: str
    paper: str
    names: str
    fidelity: str
    found: str
    claims: tuple[str, ...]


def verdicts(entry: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts of a claim."""
    found = []
    for recorded in entry["verdicts"]:
        match = _VERDICT.fullmatch(recorded["verdict"])
        if match is None:
            raise ValueError(f"A verdict must begin with one of {list(MARKS)}, got {recorded}.")
        word, rest, place, part = match.groups()
        if place in _ON_DIGITS:
            place = f"digits, {place}"
        data, *setting = (place or "").split(", ")
        if data not in DATA and data not in _OTHER_DATA:
            data, setting = "", [data, *setting] if data else []
        text = ": ".join(filter(None, (", ".join(setting), part)))
        found.append(Verdict(word, word + rest, data, text, recorded.get("evidence", "")))
    return found


def read_page(name: str, text: str) -> Page:
    """Reads of a page what the tables say of it."""

    def one(pattern: str) -> str:
        match = re.search(pattern, text, re.DOTALL | re.MULTILINE)
        if match is None:
            raise ValueError(f"docs/papers/{name}.md must have {pattern!r}.")
        return " ".join(match[1].split())

    return Page(
        name=name,
        title=one(r"^# (.+?)$"),
        paper=_short(one(r"^# .+?\n\n(.+?\(\d{4}\)|This library)")),
        names=one(r"^## API\n\n(.+?)\n\n"),
        fidelity=one(r"^## Fidelity\n\n\*\*(.+?)\.?\*\*"),
        found=one(r"^\*\*Found here\.\*\* (.+?)\n\n"),
        claims=tuple(match[1] for match in _CLAIM.finditer(text)),
    )


def _short(authors: str) -> str:
    """The last names of two authors, or of the first of more, and the year."""
    if not (match := re.fullmatch(r"(.+) \((\d{4})\)", authors)):
        return authors
    last = [name.split(". ")[-1] for name in re.split(r", | and ", match[1])]
    return f"{' and '.join(last) if len(last) < 3 else f'{last[0]} et al.'} {match[2]}"


def symbols(found: Sequence[Verdict]) -> str:
    """The marks of some verdicts, counted where there are several."""
    counts = Counter(verdict.word for verdict in found)
    if len(found) == 1:
        return MARKS[found[0].word]
    # A line may not break between a mark and its count.
    joined = (
        f"{mark}\N{WORD JOINER}{counts[word]}" for word, mark in MARKS.items() if counts[word]
    )
    return " ".join(joined)


def evidence(entry: Mapping[str, Any]) -> str:
    """A claim as it was tested: what it says, and each verdict with its numbers."""
    lines = [
        f"Tested as: {_escaped(entry['statement'])}. {entry['runs']} runs, recorded on "
        f"{entry['date']}. In print: {_escaped(entry['printed'])}.",
    ]
    by_data: dict[str, list[Verdict]] = {}
    for verdict in verdicts(entry):
        by_data.setdefault(verdict.data, []).append(verdict)
    for data, found in by_data.items():
        name = {**DATA, **_OTHER_DATA}.get(data, "")
        if name:
            lines.append(f"**{name[0].upper()}{name[1:]}**: {symbols(found)}")
        lines.append(
            "\n".join(
                f"- {MARKS[v.word]} **{v.words}**{': ' if v.part else ''}{_escaped(v.part)}.\n"
                f"  Measured: {_escaped(v.evidence)}."
                for v in found
            )
        )
    return "\n\n".join(lines)


def _escaped(text: str) -> str:
    text = text.rstrip(".")
    for old, new in {"\\": r"\\", "*": r"\*", "_": r"\_", "<": r"\<", "$": r"\$"}.items():
        text = text.replace(old, new)
    return text


def matrix(pages: Sequence[Page], entries: Mapping[str, Any]) -> str:
    """The papers and the marks of their claims on each data set, in groups."""
    by_name = {page.name: page for page in pages}
    everything = [v for entry in entries.values() for v in verdicts(entry)]
    counts = Counter(verdict.word for verdict in everything)
    total = ", ".join(f"{MARKS[word]} {counts[word]} {word}" for word in MARKS if counts[word])
    lines = [
        f"{len(everything)} statements of {len(entries)} claims: {total}.",
        "",
        "| paper | digits | Fashion-MNIST | other | what was found |",
        "|---|---|---|---|---|",
    ]
    for group, names in GROUPS.items():
        tested = [by_name[name] for name in names if by_name[name].claims]
        lines.append(f"| **{group}** | | | | |")
        for page in tested:
            found = [v for name in page.claims for v in verdicts(entries[name])]
            cells = [symbols([v for v in found if v.data == data]) for data in DATA]
            cells.append(symbols([v for v in found if v.data not in DATA]))
            link = f"[{page.title}](../{PAGES}/{page.name}.md)"
            paper = "" if page.paper == "This library" else f", {page.paper}"
            lines.append(f"| {link}{paper} | {' | '.join(cells)} | {page.found} |")
    return "\n".join(lines)


def index(pages: Sequence[Page], entries: Mapping[str, Any]) -> str:
    """All pages in groups, with names, source and marks, and the contents for the site."""
    by_name = {page.name: page for page in pages}
    parts = []
    for group, names in GROUPS.items():
        lines = [
            f"## {group}",
            "",
            "| method | paper | names | from | verdicts |",
            "|---|---|---|---|---|",
        ]
        for page in (by_name[name] for name in names):
            found = [v for name in page.claims for v in verdicts(entries[name])]
            cells = (page.paper, page.names, page.fidelity, symbols(found) or "not run")
            lines.append(f"| [{page.title}]({page.name}.md) | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def contents() -> str:
    """The contents for the site."""
    return "\n\n".join(
        "\n".join(["```{toctree}", f":caption: {group}", ":hidden:", "", *names, "```"])
        for group, names in GROUPS.items()
    )


def files(root: pathlib.Path = ROOT) -> Iterator[tuple[pathlib.Path, str]]:
    """Each file that shows verdicts, with the text that it should have."""
    entries = json.loads((root / RESULTS / "claims.json").read_text())
    texts = {
        name: (root / PAGES / f"{name}.md").read_text()
        for names in GROUPS.values()
        for name in names
    }
    pages = [read_page(name, text) for name, text in texts.items()]
    for name, text in texts.items():
        yield (
            root / PAGES / f"{name}.md",
            _CLAIM.sub(
                lambda match: (
                    f"<!-- claim: {match[1]} -->\n{evidence(entries[match[1]])}\n"
                    "<!-- end of claim -->"
                ),
                text,
            ),
        )
    text = (root / MATRIX).read_text()
    yield root / MATRIX, _between(text, "matrix", matrix(pages, entries))
    text = _between((root / INDEX).read_text(), "index", index(pages, entries))
    yield root / INDEX, _between(text, "contents", contents())


def write(root: pathlib.Path = ROOT) -> None:
    """Writes the tables of all files again."""
    for path, text in files(root):
        path.write_text(text)


def _between(text: str, mark: str, new: str) -> str:
    """The text with `new` between the marks <!-- mark --> and <!-- end of mark -->."""
    start, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    head, rest = text.split(start)
    return f"{head}{start}{new}{end}{rest.split(end)[1]}"
