"""The directive `gallery`: a card for each notebook, with its first words and one of its figures.

The figure is that of the cell with the tag `thumbnail`, else the first one.
"""

import base64
import json
import os
import pathlib

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Gallery(SphinxDirective):
    """Writes the cards, in MyST."""

    required_arguments = 1  # the folder of the notebooks

    def run(self) -> list[nodes.Node]:
        """Takes the figures out of the notebooks, which must have their outputs."""
        source = pathlib.Path(self.env.srcdir)
        lines = ["::::{grid} 1 2 2 2", ":gutter: 3", ""]
        for path in sorted((source / self.arguments[0]).glob("*.ipynb")):
            self.env.note_dependency(str(path))
            cells = json.loads(path.read_text())["cells"]
            title, text = _opening("".join(cells[0]["source"]))
            picture = pathlib.Path(self.env.doctreedir, f"{path.stem}.png")
            picture.write_bytes(_figure(cells))
            lines += [
                f":::{{grid-item-card}} {title}",
                f":link: {self.arguments[0]}/{path.stem}",
                ":link-type: doc",
                f":img-top: {os.path.relpath(picture, source)}",
                f":img-alt: A figure of the notebook: {title}",
                "",
                text,
                ":::",
            ]
        return self.parse_text_to_nodes("\n".join([*lines, "::::"]))


def _opening(text: str) -> tuple[str, str]:
    """The title, and the paragraph below it."""
    title, _, rest = text.partition("\n# ")[2].partition("\n\n")
    return title, rest.partition("\n\n")[0]


def _figure(cells: list[dict]) -> bytes:
    figures = [
        ("thumbnail" in cell["metadata"].get("tags", []), output["data"]["image/png"])
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return base64.b64decode(max(figures, key=lambda figure: figure[0])[1])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers this extension."""
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
