"""The API reference, from docstrings: `python -m docs.build FOLDER` (`make docs`). pdoc does the work.

`moe_param` loads its names when they are asked for; here all of them are, so that pdoc sees them in one place.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import moe_param


def build(folder: Path) -> None:
    """Writes the pages of every public name, and of the specs' and balancing's modules, to `folder`."""
    for name in moe_param.__all__:
        getattr(moe_param, name)
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc("moe_param", "!moe_param.cli", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
