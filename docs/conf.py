"""The site of these pages: `make docs` builds it with Sphinx, and stops at any warning."""

import posixpath
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

project = "DyLoRA-MoE"
author = "the authors of DyLoRA-MoE"
try:
    release = metadata.version("dylora-moe")
except metadata.PackageNotFoundError:
    release = ""

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
html_theme = "furo"
html_title = "DyLoRA-MoE"
html_static_path = [str(ROOT / "docs" / "_static")]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False

# As on GitHub: formulas in dollars, links to headings by their words.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"  # what docstrings set apart
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_use_ivar = True

# Other sites are asked by `make links` alone.
linkcheck_ignore = [r"http://127\.0\.0\.1.*", r"http://localhost.*", r"http://other.*"]
linkcheck_timeout = 15


def write_inline(writer: Any, node: Any) -> None:
    """A formula in a line, as MathML: browsers show it without a script, and so without a network."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def write_block(writer: Any, node: Any) -> None:
    """A formula of its own."""
    writer.body.append(
        f'<div style="overflow-x: auto; padding: .4em 0">{tex2mathml(node.astext(), as_block=True)}</div>'
    )
    raise nodes.SkipNode


def name_pages(app: Any, doctree: nodes.document, page: str) -> None:
    """Links that say `training.md`, as on GitHub, say the page's title: here there are no such files."""
    for link in doctree.findall(nodes.reference):
        named = link.astext().removesuffix(".md")
        target = link.get("refuri", "").partition("#")[0].removesuffix(".html")
        if link.astext().endswith(".md") and PurePosixPath(target).name == named:
            title = app.env.titles[posixpath.normpath(posixpath.join(posixpath.dirname(page), target))]
            link.clear()
            link += nodes.Text(title.astext())


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("doctree-resolved", name_pages)
    app.add_html_math_renderer("mathml", inline_renderers=(write_inline, None), block_renderers=(write_block, None))


html_math_renderer = "mathml"
