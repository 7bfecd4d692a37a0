"""Sphinx: `make docs`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

from torch_fused_lora.version import __version__

ROOT = Path(__file__).resolve().parent.parent

project = "torch-fused-lora"
release = __version__
html_title = f"{project} {__version__}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]  # Metal is not quite C++
default_role = "literal"  # docstrings say `name`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False


# Pages that are files elsewhere in the repository, which are read there, too.
COPIES = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "examples": "examples/README.md",
    "conformance": "tests/conformance/README.md",
    **{
        name: f"tests/emulator/{name}/README.md"
        for name in ("metal_on_cpu", "mps_on_linux", "metal_on_gpu", "macos_wheel")
    },
}


def link_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Reads a copy from where it is, and lets links lead to pages where there are, else to files, as downloads."""
    origin = ROOT / COPIES.get(page, f"docs/{page}.md")
    pages = {ROOT / file: f"{name}.md" for name, file in COPIES.items()}

    def linked(match: re.Match[str]) -> str:
        path = (origin.parent / match[1]).resolve()
        if path in pages:
            return f"]({pages[path]}{match[2]})"
        inside = path.is_relative_to(ROOT / "docs") and path.suffix in (".md", ".svg")
        here = os.path.relpath(path, ROOT / "docs")
        return f"]({here}{match[2]})" if inside else f"](path:{here})"

    text = origin.read_text() if page in COPIES else source[0]
    source[0] = re.sub(r"\]\((?!\w+:|#)([^)\s#]+)((?:#[^)\s]*)?)\)", linked, text)


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files)
