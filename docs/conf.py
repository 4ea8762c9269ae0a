"""The site: `python -m sphinx -W -b html docs OUT`. Needs the extra `docs`, and no network."""

import os
import pathlib
import sys
import tomllib

DOCS = pathlib.Path(__file__).parent.resolve()
TOP = DOCS.parent
sys.path[:0] = [str(TOP), str(DOCS / "_extensions")]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]

import source_links  # noqa: E402

import regjax  # noqa: E402

project = "regjax"
author = PROJECT["authors"][0]["name"]
version = release = regjax.__version__
html_title = f"regjax {release}"
repository = PROJECT["urls"]["Repository"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "gallery",
    "mathml",
    "plain_docstrings",
    "public_names",
    "signatures",
    "repository_links",
]
exclude_patterns = ["_extensions", "**/.ipynb_checkpoints"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

# Notebooks are shown with the outputs that they were committed with; tests/test_colabs.py runs them
# again and compares. REGJAX_DOCS_EXECUTE=1 executes those that have changed since the last build.
nb_execution_mode = "cache" if os.environ.get("REGJAX_DOCS_EXECUTE") else "off"
nb_execution_timeout = 600
nb_execution_raise_on_error = True

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = {
    "repository_url": repository,
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
html_math_renderer = "mathml"

default_role = "py:obj"
smartquotes = False
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # plain_docstrings.py has them, as written
napoleon_use_ivar = True  # fields of results in one table, as arguments are


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The [source] link of an entry of the reference."""
    return source_links.address(repository, TOP, info) if domain == "py" else None
