"""The table of the nine UCI regression sets on their fixed splits, beside the reference's own results split by split.

    python -m benchmarks.uci --data DIR                       all nine; stop it at any time, the same command goes on
    python -m benchmarks.uci --data DIR --sets yacht --splits 0-4
    python -m benchmarks.uci --data DIR --report              the table of what is done, nothing is run
    python -m benchmarks.uci --data DIR --quick               a look, not the protocol
    python -m benchmarks.uci --data DIR --beyond              ensembles with learned noise on the same splits

The reference: Gal & Ghahramani 2016, the authors' run of 2018, one hidden layer. benchmarks/README.md has the protocol.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Run as a file: modules are found from the project's root, and this folder hides none of Python's own.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.uci_sets import beyond, pool, protocol, results, sets
from benchmarks.uci_sets.comparison import DEEP_ENSEMBLES, Paired, paired

Figure = Literal["rmse", "ll"]
FIGURES: tuple[tuple[Figure, str], ...] = (("rmse", "RMSE"), ("ll", "log-likelihood"))
QUICK_SETS, QUICK_SPLITS, QUICK_EPOCHS = "yacht,bostonHousing", "0-1", 200


@dataclass(frozen=True)
class Run:
    """What is done of a set."""

    data: sets.RegressionSet
    records: list[dict[str, Any]]
    # All splits, as many epochs as they should have.
    whole: bool

    @property
    def count(self) -> str:
        return f"{len(self.records)}/{len(self.data.splits)}"

    def paired(self, figure: Figure) -> Paired:
        """Beside the reference on the splits that are done."""
        theirs = getattr(self.data.reference, figure)[[record["split"] for record in self.records]]
        return paired([record[figure] for record in self.records], theirs, higher_is_better=figure == "ll")

    def said(self, word: str) -> str:
        return word if self.whole else f"({word})"


app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of the sets: SET/data.txt, index_train_0.txt, reference/, ...")],
    out: Annotated[Path, typer.Option(help="Folder of the results, one file a set.")] = Path("uci-results"),
    names: Annotated[str, typer.Option("--sets", help="Comma-separated.")] = ",".join(sets.NAMES),
    splits: Annotated[str | None, typer.Option(help="0-4,7; default: all that a set has.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the protocol's, 4,000 or 2,000.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="One core each.")] = 2,
    quick: Annotated[bool, typer.Option(help="Two small sets, two splits, 200 epochs.")] = False,
    further: Annotated[bool, typer.Option("--beyond", help="Not the protocol: better nets, the same splits.")] = False,
    report: Annotated[bool, typer.Option(help="Only the table of what is done.")] = False,
) -> None:
    """Run what is not done yet, then print the table."""
    if quick:
        names, splits, epochs = QUICK_SETS, splits or QUICK_SPLITS, epochs or QUICK_EPOCHS
    try:
        chosen = [sets.load(data, name) for name in names.split(",")]
        wanted = {one.name: split_numbers(splits, one) for one in chosen}
    except sets.DataError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    work = beyond.run if further else protocol.run
    usual = {one.name: beyond.default_epochs(one) if further else one.epochs for one in chosen}
    own_epochs = {name: epochs or count for name, count in usual.items()}
    files = {one.name: out / f"{one.name}{'.beyond' if further else ''}.jsonl" for one in chosen}
    if not report:
        queue = []
        for one in chosen:
            done = results.by_split(results.read(files[one.name]), own_epochs[one.name])
            queue += pool.batches(one, [at for at in wanted[one.name] if at not in done], own_epochs[one.name])
        try:
            run_all(work, data, queue, processes, files)
        except KeyboardInterrupt:
            typer.echo("stopped: the same command goes on", err=True)
            raise typer.Exit(130) from None
    runs = []
    for one in chosen:
        done = results.by_split(results.read(files[one.name]), own_epochs[one.name])
        records = [done[split] for split in wanted[one.name] if split in done]
        whole = len(records) == len(one.splits) and own_epochs[one.name] == usual[one.name]
        runs.append(Run(one, records, whole))
    (print_beyond if further else print_protocol)(runs)


def run_all(work: pool.Work, data: Path, queue: list[pool.Batch], processes: int, files: dict[str, Path]) -> None:
    """Write each batch's records as they come."""
    start = time.perf_counter()
    for number, (batch, records) in enumerate(pool.run(work, data, queue, processes), 1):
        results.append(files[batch.set_name], records)
        splits = ", ".join(map(str, batch.splits))
        seconds = time.perf_counter() - start
        typer.echo(f"{seconds:6.0f} s  {number}/{len(queue)}  {batch.set_name}: split {splits}", err=True)


def split_numbers(text: str | None, data: sets.RegressionSet) -> list[int]:
    """`0-2,5` as numbers. Raises DataError."""
    count = len(data.splits)
    if text is None:
        return list(range(count))
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise sets.DataError(f"--splits {text!r} is not like 0-4,7")
        numbers += range(int(first), int(last or first) + 1)
    if not numbers or max(numbers) >= count:
        raise sets.DataError(f"--splits {text!r}: {data.name} has splits 0-{count - 1}")
    return sorted(set(numbers))


def print_protocol(runs: list[Run]) -> None:
    """Each set's means beside the reference's on the same splits, the paired differences, and what came of it."""
    table = Table("set", "splits", "figure", "ours", "reference", "difference ± error", "", box=None, pad_edge=False)
    verdicts = []
    for run in runs:
        for figure, label in FIGURES:
            name, count = (run.data.name, run.count) if figure == "rmse" else ("", "")
            if not run.records:
                table.add_row(name, count, label, "", "", "", "not run")
                continue
            pair = run.paired(figure)
            if run.whole:
                verdicts.append(pair.met)
            digits = 5 if abs(pair.theirs) < 0.01 else 4 if abs(pair.theirs) < 0.1 else 3
            table.add_row(
                name,
                count,
                label,
                f"{pair.ours:.{digits}f}",
                f"{pair.theirs:.{digits}f}",
                f"{pair.difference:+.{digits}f} ± {pair.error:.{digits}f}",
                run.said("met" if pair.met else "missed"),
            )
    Console(width=120).print(table)
    print("wanted: within one standard error of the reference or better, paired by split: 18 figures of nine sets")
    print(f"found: met {sum(verdicts)}, missed {len(verdicts) - sum(verdicts)}, not whole {18 - len(verdicts)}")


def print_beyond(runs: list[Run]) -> None:
    """Log-likelihoods beside the reference's on the same splits, and beside those that Deep Ensembles published."""
    titles = ("set", "splits", "RMSE", "log-likelihood", "reference", "difference ± error", "", "Deep Ensembles", "")
    table = Table(*titles, box=None, pad_edge=False)
    better: list[tuple[bool, bool]] = []
    for run in runs:
        if not run.records:
            table.add_row(run.data.name, run.count, "", "", "", "", "not run")
            continue
        pair, rmse, published = run.paired("ll"), run.paired("rmse"), DEEP_ENSEMBLES[run.data.name]
        found = pair.difference > 0, pair.ours > published
        if run.whole:
            better.append(found)
        table.add_row(
            run.data.name,
            run.count,
            f"{rmse.ours:.{5 if rmse.ours < 0.01 else 3}f}",
            f"{pair.ours:.3f}",
            f"{pair.theirs:.3f}",
            f"{pair.difference:+.3f} ± {pair.error:.3f}",
            run.said("better" if found[0] else "not better"),
            f"{published:.2f}",
            run.said("better" if found[1] else "not better"),
        )
    Console(width=140).print(table)
    reference, ensembles = (sum(column) for column in zip(*better, strict=True)) if better else (0, 0)
    print("wanted: a better mean log-likelihood than the reference on 7 of 9 sets, than Deep Ensembles' on 5 of 9")
    print(f"found, of {len(better)} whole sets: than the reference on {reference}, than Deep Ensembles' on {ensembles}")


if __name__ == "__main__":
    app()
