"""What the engine is held to, and whether the figures of a run reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

KEPT, DRAWN = "ours, kept masks", "ours, drawn masks"
EAGER, FOLDED = "eager loop", "folded tf.function"
NOT_MEASURED = "not measured"
NOT_PEERS = frozenset({KEPT, DRAWN, EAGER, FOLDED, "predict loop"})

SAVED_MODEL_SPARE_BYTES = 10e6
PACKAGING_S = 60.0


@dataclass(frozen=True)
class Cell:
    """All contestants' figures for one model, number of draws and number of rows. Seconds are for all the draws."""

    letter: str
    draws: int
    rows: int
    seconds: dict[str, float]
    samples: dict[str, list[float]]
    timed_draws: dict[str, int]

    def fastest(self, form: str) -> str | None:
        """The fastest peer whose name ends with `form`."""
        peers = [name for name in self.seconds if name not in NOT_PEERS and name.endswith(form)]
        return min(peers, key=lambda name: self.seconds[name]) if peers else None


@dataclass(frozen=True)
class Figures:
    """flops: by letter, once a row and once a row and draw. peak_flops: of the core, a second."""

    cells: list[Cell]
    flops: dict[str, tuple[float, float]]
    peak_flops: float
    packaging: dict[str, dict[str, Any]]

    def share(self, cell: Cell, ours: str) -> float:
        """Share of the core's GEMM peak that the useful operations reach."""
        once, each = self.flops[cell.letter]
        return (once + each * cell.draws) * cell.rows / cell.seconds[ours] / self.peak_flops


@dataclass(frozen=True)
class Verdict:
    what: str
    wanted: str
    where: str
    found: str
    drawn: str
    word: str


@dataclass(frozen=True)
class _Ratio:
    """Time of `against` over ours, in every cell that `holds` for."""

    against: str
    letters: str
    where: str
    holds: Callable[[Cell], bool]
    wanted: float


# The peers' forms, as `benchmarks.peers` has them: by the documentation, and by hand with our own techniques.
_BEST_FOLDED, _BEST_TUNED = "best folded peer", "best tuned peer"
_FORMS = {_BEST_FOLDED: "folded", _BEST_TUNED: "tuned"}


def _many(cell: Cell) -> bool:
    return cell.rows >= 8 and cell.draws >= 100


def _one_row(cell: Cell) -> bool:
    return cell.rows == 1


def _one_row_long(cell: Cell) -> bool:
    return cell.rows == 1 and cell.draws >= 100


def _eight_rows_long(cell: Cell) -> bool:
    return cell.rows == 8 and cell.draws >= 100


def _any(cell: Cell) -> bool:
    return True


_RATIOS = (
    _Ratio(EAGER, "ab", "1 row, T >= 100", _one_row_long, 250),
    _Ratio(EAGER, "c", "1 row, T >= 100", _one_row_long, 140),
    _Ratio(EAGER, "e", "8 rows, T >= 100", _eight_rows_long, 700),
    _Ratio(FOLDED, "abcde", "every cell", _any, 1.3),
    _Ratio(FOLDED, "a", "rows >= 8, T >= 100", _many, 3.5),
    _Ratio(FOLDED, "b", "rows >= 8, T >= 100", _many, 1.7),
    _Ratio(FOLDED, "c", "every cell", _any, 4.5),
    _Ratio(FOLDED, "e", "every cell", _any, 20),
    *(
        _Ratio(best, letters, where, holds, wanted)
        for best in _FORMS
        for letters, where, holds, wanted in (
            *((letter, "rows >= 8, T >= 100", _many, 1.0) for letter in "abcde"),
            ("b", "1 row", _one_row, 0.9),
            ("c", "1 row", _one_row, 0.9),
            ("a", "1 row", _one_row, 1.0),
        )
    ),
)
_SHARES = (("b", 0.8), ("c", 0.7))


def verdicts(figures: Figures) -> Iterator[Verdict]:
    """One line for each figure that must be reached: its worst cell, with kept masks (and the same with drawn ones)."""
    for ratio in _RATIOS:
        yield _of_ratio(ratio, figures)
    for letter, wanted in _SHARES:
        yield _of_share(letter, wanted, figures)
    if "e" in figures.packaging:
        yield from _of_packaging(figures.packaging["e"])


def _of_ratio(ratio: _Ratio, figures: Figures) -> Verdict:
    what, wanted = f"({ratio.letters}) against {ratio.against}, {ratio.where}", f"{ratio.wanted:g} x"
    found: list[tuple[float, float, str]] = []
    for cell in figures.cells:
        against = cell.fastest(_FORMS[ratio.against]) if ratio.against in _FORMS else ratio.against
        if cell.letter in ratio.letters and ratio.holds(cell) and against in cell.seconds:
            seconds = cell.seconds[against]
            where = f"{cell.letter} T={cell.draws} rows={cell.rows}"
            if ratio.against in _FORMS:
                where += f" {against}"
            found.append((seconds / cell.seconds[KEPT], seconds / cell.seconds[DRAWN], where))
    if not found:
        return Verdict(what, wanted, "", "", "", NOT_MEASURED)
    kept, drawn, where = min(found)
    return Verdict(what, wanted, where, f"{figure(kept)} x", f"{figure(drawn)} x", _word(kept >= ratio.wanted))


def _of_share(letter: str, wanted: float, figures: Figures) -> Verdict:
    what = f"({letter}) share of the GEMM peak, T = 1000, 8 rows"
    for cell in figures.cells:
        if (cell.letter, cell.draws, cell.rows) == (letter, 1000, 8) and letter in figures.flops:
            kept, drawn = figures.share(cell, KEPT), figures.share(cell, DRAWN)
            where = f"{letter} T=1000 rows=8"
            return Verdict(what, f"{wanted:.0%}", where, f"{kept:.1%}", f"{drawn:.1%}", _word(kept >= wanted))
    return Verdict(what, f"{wanted:.0%}", "", "", "", NOT_MEASURED)


def _of_packaging(packed: dict[str, Any]) -> Iterator[Verdict]:
    seconds = packed["seconds"]
    yield Verdict("(e) packaging", f"{PACKAGING_S:.0f} s", "", f"{seconds:.1f} s", "", _word(seconds <= PACKAGING_S))
    size = packed["graph_bytes"] + packed["variables_bytes"]
    bound = packed["weights_bytes"] + SAVED_MODEL_SPARE_BYTES + packed["kept_bound_bytes"]
    yield Verdict(
        "(e) SavedModel, weights + 10 MB + kept masks' bound",
        f"{bound / 1e6:.1f} MB",
        "",
        f"{size / 1e6:.1f} MB",
        "",
        _word(size <= bound),
    )


def figure(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _word(reached: bool) -> str:
    return "PASS" if reached else "FALLS SHORT"
