"""The site builds without a warning, its links lead somewhere, and people can read it in a browser.

It is built once for all tests and workers, without a network. What needs a browser is skipped where
Chromium is not installed; no page may load anything from elsewhere.
"""

import fcntl
import functools
import http.server
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.faces import FACES, public_names

pytestmark = pytest.mark.slow  # the same on every Python

TOP = pathlib.Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
PHONE = {"width": 390, "height": 844}
VOID = {"img", "script", "link", "iframe"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    built, report = folder / "site", folder / "site.log"
    with open(folder / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(built)]
            done = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
            report.write_text(done.stderr + "failed" * (done.returncode != 0))
    assert report.read_text() == ""
    return built


class Page(HTMLParser):
    """The anchors of a page, where its links lead, what it loads, and its text."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.text = set(), [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found.get("id"), found.get("name")} - {None}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in VOID and found.get("rel") not in (
            "canonical",
            "next",
            "prev",
            "index",
            "search",
        ):
            self.loads += [found[name] for name in ("src", "href") if found.get(name)]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages(site):
    found = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {path: Page(path) for path in found}


def broken(pages):
    """The links of pages that lead nowhere, and what they load from elsewhere or does not exist."""
    for path, page in pages.items():
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https", "mailto", "data"):
                if address in page.loads and parts.scheme != "data":
                    yield path.name, address
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in anchors):
                yield path.name, address


def test_links_lead_somewhere_and_pages_load_nothing_from_elsewhere(pages):
    assert len(pages) > 20
    assert list(broken(pages)) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<a href='other.html'></a><a href='#x'></a><a href='#here' id='here'></a>"
                    "<img src='https://example.org/x.png'>")  # fmt: skip
    assert [address for _, address in broken({page: Page(page)})] == [
        "other.html", "#x", "https://example.org/x.png"
    ]  # fmt: skip


def test_every_public_name_has_an_entry_and_private_modules_are_not_shown(pages):
    reference = {path: page for path, page in pages.items() if path.parent.name == "api"}
    anchors = set().union(*(page.anchors for page in reference.values()))
    names = {f"{face}.{name}" for face in FACES for name in public_names(face)}
    assert "regjax.curvature.top_eigenpairs" in names
    assert "regjax.normalization.nnx.BatchNorm" in names
    assert names - anchors == set()
    for page in reference.values():
        assert re.findall(r"regjax[\w.]*\._\w+", page.text) == []


def test_functions_and_classes_link_to_their_source(pages):
    repository = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["urls"][
        "Repository"
    ]
    place = re.compile(rf"{re.escape(repository)}/blob/main/(regjax/\S+\.py)#L(\d+)-L(\d+)")
    reference = [page for path, page in pages.items() if path.parent.name == "api"]
    found = [place.fullmatch(link) for page in reference for link in page.links]
    shown = {}
    for match in filter(None, found):
        lines = (TOP / match[1]).read_text().splitlines()[int(match[2]) - 1 : int(match[3])]
        shown.update((line.split()[1].split("(")[0].rstrip(":"), match[1]) for line in lines
                     if line.startswith(("def ", "class ")))  # fmt: skip
    assert shown["top_eigenpairs"] == "regjax/curvature/_eigen.py"
    assert shown["EigenResult"] == "regjax/curvature/_eigen.py"
    names = {name for face in FACES for name in public_names(face)}
    assert len(names & shown.keys()) > 0.9 * len(names)


def test_signatures_have_the_types_of_the_source(pages):
    page = next(page for path, page in pages.items() if path.name == "curvature.html")
    text = " ".join(page.text.split())
    assert "loss_fn: LossFn, params: Params, *batch: Tree, chunk_size: int | None = None" in text
    assert "tol: ArrayLike = 1e-3" in text


def test_the_build_refuses_a_name_without_an_entry(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "docs" / "_extensions")
    extension = importlib.import_module("public_names")
    names = {name for found in extension.addresses().values() for name in found.values()}
    assert extension.without_entry(names) == []
    assert extension.without_entry(names - {"regjax.curvature.hvp"}) == ["regjax.curvature.hvp"]


def test_plain_docstrings_become_markup(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "docs" / "_extensions")
    extension = importlib.import_module("plain_docstrings")
    plain = """Takes `hessian`s of |w|, and `b c`
of *batch.

    y = |x| * 2

  >>> print("`2`")
"""
    assert extension.rst_of(plain.split("\n"), "regjax.curvature") == [
        r"Takes :py:obj:`hessian <regjax.curvature.hessian>`\ s of \|w\|, and ``b c``",
        r"of \*batch.", "",
        ".. code-block:: none", "   :class: formula", "", "   y = |x| * 2", "   ", "",
        '  >>> print("`2`")', "",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: nothing is looked at in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(site):
    """Of the site on a server of its own, as the search wants it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def tab(browser):
    """A page that collects what goes wrong in it."""
    context = browser.new_context()
    opened = context.new_page()
    opened.errors = []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("requestfailed", lambda request: opened.errors.append(request.failure))
    opened.on("response", lambda answer: answer.status >= 400 and opened.errors.append(answer.url))
    yield opened
    # To leave a page ends what it still reads.
    assert set(opened.errors) <= {"net::ERR_ABORTED"}
    context.close()


HEIGHTS = "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)"
RAW = re.compile(r"\\(?:frac|lambda|sum|lVert|mathrm|nabla)\b|\$\$")


def test_pages_render_with_formulas_and_fit_on_a_phone(tab, address, site, pages):
    tab.set_viewport_size(PHONE)
    too_wide, not_set, num_formulas = {}, [], 0
    for path in pages:
        tab.goto(f"{address}/{path.relative_to(site)}")
        assert tab.locator("h1:visible").first.inner_text().strip(), path.name
        width = tab.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            too_wide[path.name] = width
        heights = tab.evaluate(HEIGHTS)
        num_formulas += len(heights)
        if min(heights, default=10) < 5 or RAW.search(tab.locator("main").inner_text()):
            not_set.append(path.name)
    assert too_wide == {}
    assert not_set == []
    assert num_formulas > 20


def test_the_search_finds_a_function(tab, address):
    tab.goto(f"{address}/search.html?q=top_eigenpairs")
    first = tab.locator("#search-results li a").first
    first.wait_for(timeout=20_000)
    assert first.get_attribute("href").endswith(
        "api/curvature.html#regjax.curvature.top_eigenpairs"
    )
    first.click()
    # The address changes before the page is there; one that never comes is an error.
    tab.locator("[id='regjax.curvature.top_eigenpairs']").wait_for(timeout=20_000)
