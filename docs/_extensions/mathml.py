"""Formulas as MathML, which browsers set themselves: no script and nothing to load.

docutils translates; a formula that it cannot read is a warning, so that `-W` fails.
"""

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator


def _visit(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    is_block = isinstance(node, nodes.math_block)
    try:
        mathml = latex2mathml.tex2mathml(node.astext(), as_block=is_block)
    except MathError as error:
        message = "%s: no MathML for %r"
        logging.getLogger(__name__).warning(message, error, node.astext(), location=node)
        mathml = f"<code>{translator.encode(node.astext())}</code>"
    if is_block:
        translator.body.append(translator.starttag(node, "div", CLASS="formula"))
        translator.body.append(f"{mathml}</div>")
    else:
        translator.body.append(mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers this extension."""
    app.add_html_math_renderer("mathml", (_visit, None), (_visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
