"""The page of a report: self-contained, escaped, its tables and figures as they were given."""

import re

import pytest

from tests.training.pages import read_page
from training.report import Figure, Grid, Section, draw, is_number, page


def example() -> Figure:
    def on(canvas):
        axis = canvas.subplots()
        axis.plot([1, 2, 3], [3, 1, 2], label="a curve")
        axis.set_xlabel("epoch & more")
        axis.legend()

    return draw("A curve that falls & rises.", on)


def test_page_has_its_sections_in_order_and_needs_nothing_else():
    grid = Grid(["class", "rows"], [["mine", "22"], ["rock", "20"]], "Rows of each class.")
    html = page("a <b> & c", "sub", [Section("First", ["Some words."], [example()], [grid]), Section("Second")])
    read = read_page(html)
    assert read.headings == ["a <b> & c", "First", "Second"]
    assert read.tables == [[["class", "rows"], ["mine", "22"], ["rock", "20"]]]
    assert read.captions == ["A curve that falls & rises.", "Rows of each class."]
    assert not read.references
    assert "<b>" not in html


def test_what_people_call_their_columns_is_text_and_no_markup():
    name = "<script>alert(1)</script>"
    html = page(name, name, [Section(name, [name], grids=[Grid([name], [[name]], name)])])
    assert "<script" not in html
    assert read_page(html).tables == [[[name], [name]]]


def test_figure_is_vectors_with_text_that_can_be_searched_and_the_same_every_time():
    first = example()
    assert first.svg == example().svg
    assert first.svg.startswith("<svg")
    assert ">epoch &amp; more</text>" in first.svg
    assert ">a curve</text>" in first.svg
    assert "<image" not in first.svg
    assert not re.search(r"\b20\d\d-\d\d-\d\d", first.svg)


def test_names_with_dollars_are_no_formulas():
    name = "a$b_{$c"

    def on(canvas):
        axis = canvas.subplots()
        axis.semilogx([1, 1_000], [0, 1], label=name)
        axis.set_yticks([0, 1], [name, name])
        axis.set_title(name)
        axis.legend()

    svg = draw(name, on).svg
    assert svg.count(f">{name}</text>") == 4
    assert ">$" not in svg, "the powers of ten"


def test_names_inside_of_two_figures_do_not_meet():
    def other(canvas):
        canvas.subplots().scatter([1, 2], [3, 4])

    html = page("t", "s", [Section("x", figures=[example(), draw("Other.", other)])])
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(names)


@pytest.mark.parametrize("text", ["1", "0.5", "1,797", "-3.2e-05", "90.5 ± 4.5 %", "0.261", "95 %"])
def test_numbers_stand_at_the_right(text):
    assert is_number(text)
    assert Grid(["a"], [[text], [""]]).are_numbers == [True]
    assert Grid(["a"], [[text], ["none"]]).are_numbers == [False]


@pytest.mark.parametrize("text", ["", "mine", "60, 30", "1 to 2", "none"])
def test_other_text_does_not(text):
    assert not is_number(text)
