"""A report as one HTML file that needs nothing else: no network, no library, any screen, light or dark, paper.

What a page can hold is the few dataclasses here, plain values and pictures; how it looks is in `templates/`. The same
data give the same file, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Verdict:
    """A large number on top of the page."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence in a box: what to be careful about."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, with the sentence that says what it shows to who cannot see it."""

    figure: Any
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table. `mark`: best, failed, or nothing."""

    cells: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True)
class TableOf:
    """Columns of numbers are aligned on the right; a table wider than the screen scrolls by itself."""

    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers only, gaps aside."""
        columns = zip(*(row.cells for row in self.rows)) if self.rows else [()] * len(self.headings)
        return tuple(all(map(is_number, column)) and any(column) for column in columns)


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    label: str = "command"


@dataclass(frozen=True)
class Gallery:
    """Parts beside each other where there is room."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Details:
    """What is folded away until asked for."""

    summary: str
    parts: tuple[Part, ...]


Part = Note | Figure | TableOf | Code | Gallery | Details


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Page:
    """`facts`: versions, hardware, dates, as (name, value)."""

    title: str
    lead: str
    verdicts: tuple[Verdict, ...] = ()
    sections: tuple[Section, ...] = ()
    facts: tuple[tuple[str, str], ...] = field(default=())


def write(path: Path, page: Page) -> None:
    """The page into a file; who reads it meanwhile sees the old one or the new one."""
    text = html(page)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def html(page: Page) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = iter(range(10**6))
    environment.filters["svg"] = lambda figure: Markup(svg(figure, f"f{next(drawn)}-"))
    environment.filters["kind"] = lambda part: type(part).__name__
    style, script = (_template(name).strip() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(_template("page.html")).render(
        page=page, style=Markup(style), script=Markup(script), script_digest=digest
    )


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text("utf-8")


NUMBER = re.compile(r"[+\-−±<≤>×]?\s*(\d[\d,]*\.?\d*(e[+\-]?\d+)?|2[⁻⁰¹²³⁴-⁹]+)\s*(%|s|[kMBT])?(\s*±\s*[\d.]+)?")
MISSING = ("", "–", "diverged", "∞")


def is_number(cell: str) -> bool:
    """Digits with a sign, a unit, an interval; or that there is none."""
    return cell in MISSING or NUMBER.fullmatch(cell) is not None


# -- pictures ----------------------------------------------------------------------------------------------------------
COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#1f77b4": "var(--blue)",
    "#ff7f0e": "var(--orange)",
    "#2ca02c": "var(--green)",
    "#d62728": "var(--red)",
    "#9467bd": "var(--purple)",
    "#8c564b": "var(--brown)",
    "#e377c2": "var(--pink)",
    "#7f7f7f": "var(--grey)",
    "#808080": "var(--grey)",
    "#bcbd22": "var(--olive)",
    "#17becf": "var(--cyan)",
    "#b0b0b0": "var(--grid)",
    "#cccccc": "var(--faint)",
}
"""matplotlib's colours → those of the page, which are other ones in the dark. A colour that is not here stays."""


def svg(figure: Any, prefix: str) -> str:
    """A figure as an element of the page: its text is text, its colours are the page's, its ids are its own."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "moe-param"}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px)[^;\"]*", r"font-size: \1", text)  # the family is the page's
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda at: f"{at[1]}: {COLOURS.get(at[2], at[2])}", text)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    names = {name for pair in used for name in pair if name}
    text = re.sub(r' id="([^"]+)"', lambda at: f' id="{prefix}{at[1]}"' if at[1] in names else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}", text)
    text = re.sub(r"\n\s*", "\n", text)
    return _sized(text.strip())


def _sized(text: str) -> str:
    """Its width and height go from the element, where they are fixed, to a style, where the page can scale them."""
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening[0])
    assert box is not None
    head = f'<svg viewBox="0 0 {box[1]} {box[2]}" style="--width: {float(box[1]):.0f}" aria-hidden="true">'
    return head + text[opening.end() :]


# -- small helpers for who writes a page -------------------------------------------------------------------------------
def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str, note: str = "") -> TableOf:
    """Of rows without marks."""
    return TableOf(tuple(headings), tuple(Row(tuple(row)) for row in rows), caption, note)


def command(text: str, width: int = 76) -> Code:
    """A command as it can be typed, an option a line where it is long."""
    if len(text) <= width:
        return Code(text)
    lines: list[str] = []
    for word in shlex.split(text):
        quoted = shlex.quote(word)
        if not lines or (word.startswith("--") and word != "--"):
            lines.append(quoted)
        else:
            lines[-1] += " " + quoted
    return Code(" \\\n    ".join(lines))
