"""The wheel and the source distribution: what is in them, and that the wheel needs no extras.

They are built by the packages of this environment, without asking an index. `.ci/run` installs the
wheel into an environment of its own as well, and runs `without_extras.py` there.
"""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import regjax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEVER = re.compile(r"(^|/)(__pycache__|\.git|\.venv[^/]*|runs|dist|\.[a-z]+_cache)(/|$)|\.pyc$")
_BUILD = """
import hatchling.build, sys
hatchling.build.build_wheel(sys.argv[1])
hatchling.build.build_sdist(sys.argv[1])
"""


def run(*words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of both."""
    folder = tmp_path_factory.mktemp("dist")
    run("-c", _BUILD, str(folder))
    return folder


def test_the_wheel_is_the_package_and_its_licence(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"regjax-{regjax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names, info = archive.namelist(), f"regjax-{regjax.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
    package = ROOT / "regjax"
    files = {
        str(path.relative_to(ROOT)) for path in package.rglob("*.*") if not NEVER.search(str(path))
    }
    assert {"regjax/py.typed", "regjax/experiments/_page.html"} <= files
    assert {name for name in names if not name.startswith(info)} == files
    assert f"{info}/licenses/LICENSE" in names
    assert f"{info}/entry_points.txt" in names
    for name in ("Author", "Keywords", "Classifier", "Project-URL", "Requires-Python", "Summary"):
        assert re.search(rf"^{name}: .+", metadata, re.MULTILINE), name
    assert "License-Expression: Apache-2.0" in metadata
    assert "# regjax" in metadata  # the README


def test_the_source_distribution_is_the_checkout(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"):
        assert name in names
    for name in ("pyproject.toml", "constraints.txt", "tests/test_package.py", ".ci/run"):
        assert name in names
    for name in ("regjax/__init__.py", "benchmarks/__main__.py", "docs/vocabulary.md"):
        assert name in names
    assert not [name for name in names if NEVER.search(name)]


def test_the_package_works_without_extras():
    assert "works without extras" in run("tests/without_extras.py", "--block")


def test_a_citation_has_what_its_format_asks_for():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    fields = dict(re.findall(r"^([a-z-]+): *(.*)$", "\n".join(lines), re.MULTILINE))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(fields)
    assert fields["version"] == regjax.__version__
    assert fields["license"] == PROJECT["license"]
    assert fields["repository-code"] == PROJECT["urls"]["Repository"]
    assert f"  - name: {PROJECT['authors'][0]['name']}" in lines


def test_the_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert regjax.__version__ in text
    assert re.search(r"^## \[(Unreleased|[\d.]+\] - \d{4}-\d\d-\d\d)", text, re.MULTILINE)
