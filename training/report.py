"""A report as one HTML page that needs nothing else: sections of text, tables and vector figures, readable on paper.

    page("sonar", "a network with dropout", [Section("Results", paragraphs=("...",), figures=(figure,))])

`draw` makes a figure with matplotlib: what it is given draws on matplotlib's own `Figure`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from cycler import cycler
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

TEMPLATE = "report.html.jinja"

# Told apart by readers who see no red or green (Okabe & Ito 2008); on grey paper by the line styles.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))

STYLE: dict[Any, Any] = {
    # Text stays text: it can be searched and copied, and takes the page's own typeface.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    # Two `$` in a name are no formula.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS[:4], linestyle=LINES[:4]),
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figure:
    svg: Markup
    # What is to be seen, in a sentence.
    caption: str


@dataclass(frozen=True)
class Grid:
    """A table."""

    headings: Sequence[str]
    # As they are shown.
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def are_numbers(self) -> list[bool]:
        """Of each column: whether all that stands in it are numbers, which stand at the right."""
        columns = zip(*self.rows, strict=True) if self.rows else [[]] * len(self.headings)
        return [all(is_number(cell) for cell in column if cell) and any(column) for column in columns]


@dataclass(frozen=True)
class Section:
    """One heading and what is under it: text, then figures, then tables."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    grids: Sequence[Grid] = ()


def draw(caption: str, on: Callable[[Canvas], None], *, width: float = 6.6, height: float = 3.0) -> Figure:
    """A figure of that size in inches; `on` draws on an empty canvas."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": caption}):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        on(canvas)
        _show_powers_of_ten(canvas)
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    # Groups are numbered alike in every figure, and a page has each name once.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    return Figure(Markup(svg.replace("<svg", '<svg role="img"', 1)), caption)


def _show_powers_of_ten(canvas: Canvas) -> None:
    """What matplotlib writes at a logarithmic axis is a formula."""
    for axes in canvas.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                for label in axis.get_ticklabels(which="both"):
                    label.set_parse_math(True)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(title=title, subtitle=subtitle, sections=sections)


def is_number(text: str) -> bool:
    """Whether a cell of a table is a number, a share, or either with its error."""
    return re.fullmatch(r"[−-]?[\d,]*\.?\d+(e[+-]?\d+)?( ?%)?( ± [\d.]+( ?%)?)?", text) is not None
