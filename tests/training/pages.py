"""A report as a reader of HTML meets it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Page:
    headings: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    # Rows of cells of each table, the headings first.
    tables: list[list[list[str]]] = field(default_factory=list)
    # Whatever would be fetched from elsewhere, or run.
    references: list[str] = field(default_factory=list)
    # Text inside of each figure.
    figures: list[list[str]] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self.places: dict[str, list[str]] = {
            "h1": self.page.headings,
            "h2": self.page.headings,
            "p": self.page.paragraphs,
            "figcaption": self.page.captions,
            "caption": self.page.captions,
        }
        self.into: list[str] | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "base"):
            self.page.references.append(tag)
        for name, value in attributes:
            fetched = name in ("src", "href", "xlink:href", "data", "action")
            if fetched and not (value or "").startswith(("#", "data:image/png;base64,")):
                self.page.references.append(f"{name}={value}")
        if tag == "table":
            self.page.tables.append([])
        elif tag == "tr":
            self.page.tables[-1].append([])
        elif tag == "figure":
            self.page.figures.append([])
        self.into = self.places.get(tag)
        if tag in ("td", "th"):
            self.into = self.page.tables[-1][-1]
        elif tag == "text":
            self.into = self.page.figures[-1]
        if self.into is not None:
            self.into.append("")

    def handle_endtag(self, tag: str) -> None:
        self.into = None

    def handle_data(self, data: str) -> None:
        if self.into is not None:
            self.into[-1] += data


def read_page(html: str) -> Page:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert "@import" not in html
    assert "url(http" not in html
    return reader.page
