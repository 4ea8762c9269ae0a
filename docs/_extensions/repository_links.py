"""Relative links that leave docs/ go to the repository, so that pages read the same there and here.

`../README.md` becomes an address of the repository, `../colabs/x.ipynb` the notebook's page here. A
file that does not exist stays a broken link, which `-W` refuses.
"""

import pathlib

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class RepositoryLinks(SphinxTransform):
    """Replaces MyST's references to files outside of the documentation."""

    default_priority = 5

    def apply(self, **kwargs: object) -> None:
        """Looks at each reference that MyST has made of a relative link."""
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for link in list(self.document.findall(kind)):
                if link.get("reftype") == "myst":
                    self._redirect(link)

    def _redirect(self, link: nodes.Element) -> None:
        docs = pathlib.Path(self.env.srcdir).resolve()
        target, _, anchor = link["reftarget"].partition("#")
        anchor = anchor or link.get("reftargetid") or ""
        path = pathlib.Path(docs, self.env.docname).parent.joinpath(target).resolve()
        if link.get("refdomain") == "doc":  # the suffix is cut off
            candidates = [path.with_name(path.name + suffix) for suffix in (".md", ".ipynb")]
            path = next((file for file in candidates if file.exists()), path)
        if not target or not path.exists() or path.is_relative_to(docs):
            return
        inside = path.relative_to(docs.parent)
        if inside.parts[0] == "colabs" and path.suffix == ".ipynb":
            link["reftarget"] = str(inside.with_suffix(""))
            link["refdomain"] = "doc"
            return
        address = self.config.html_theme_options["repository_url"]
        view = "tree" if path.is_dir() else "blob"
        address = f"{address}/{view}/main/{inside}{'#' * bool(anchor)}{anchor}"
        link.replace_self(nodes.reference("", "", *link.children, refuri=address))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers this extension."""
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
