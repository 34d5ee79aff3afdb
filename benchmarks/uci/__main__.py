"""The table of the nine UCI regression sets on their fixed splits, beside the reference's own results split by split.

    python -m benchmarks.uci --data DIR                       all nine; stop it at any time, the same command goes on
    python -m benchmarks.uci --data DIR --sets yacht --splits 0-4
    python -m benchmarks.uci --data DIR --report              the table of what is done, nothing is run
    python -m benchmarks.uci --data DIR --quick               a few minutes' look, not the protocol

The reference: Gal & Ghahramani 2016, the authors' run of 2018, one hidden layer. benchmarks/README.md has the protocol.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.uci import pool, protocol, results, sets
from benchmarks.uci.comparison import paired

QUICK_SETS, QUICK_SPLITS, QUICK_EPOCHS = "yacht,bostonHousing", "0-1", 200

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
    own_epochs = {one.name: epochs or one.epochs for one in chosen}
    if not report:
        queue = []
        for one in chosen:
            done = results.by_split(results.read(out / f"{one.name}.jsonl"), own_epochs[one.name])
            queue += pool.batches(one, [at for at in wanted[one.name] if at not in done], own_epochs[one.name])
        start = time.perf_counter()
        for number, (batch, records) in enumerate(pool.run(protocol.run, data, queue, processes), 1):
            results.append(out / f"{batch.set_name}.jsonl", records)
            at = ", ".join(map(str, batch.splits))
            typer.echo(
                f"{time.perf_counter() - start:6.0f} s  {number}/{len(queue)}  {batch.set_name}: split {at}", err=True
            )
    print_table(chosen, wanted, own_epochs, out)


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


def print_table(
    chosen: list[sets.RegressionSet], wanted: dict[str, list[int]], epochs: dict[str, int], out: Path
) -> None:
    """Each set's means beside the reference's on the same splits, the paired differences, and what came of it."""
    table = Table("set", "splits", "figure", "ours", "reference", "difference ± error", "", box=None, pad_edge=False)
    verdicts = []
    for data in chosen:
        done = results.by_split(results.read(out / f"{data.name}.jsonl"), epochs[data.name])
        have = [split for split in wanted[data.name] if split in done]
        if not have:
            table.add_row(data.name, f"0/{len(data.splits)}", "", "", "", "", "not run")
            continue
        full = len(have) == len(data.splits) and epochs[data.name] == data.epochs
        note = "" if full else " so far" if epochs[data.name] == data.epochs else " (not the protocol)"
        name, count = data.name, f"{len(have)}/{len(data.splits)}"
        for figure, theirs in (("rmse", data.reference.rmse), ("ll", data.reference.ll)):
            pair = paired([done[at][figure] for at in have], theirs[have], higher_is_better=figure == "ll")
            word = "met" if pair.met else "missed"
            verdicts.append((pair.met, full))
            digits = 5 if abs(pair.theirs) < 0.01 else 4 if abs(pair.theirs) < 0.1 else 3
            table.add_row(
                name,
                count,
                {"rmse": "RMSE", "ll": "log-likelihood"}[figure],
                f"{pair.ours:.{digits}f}",
                f"{pair.theirs:.{digits}f}",
                f"{pair.difference:+.{digits}f} ± {pair.error:.{digits}f}",
                word + note,
            )
            name = count = ""
    Console(width=120).print(table)
    whole = [met for met, full in verdicts if full]
    print("wanted: within one standard error of the reference or better, paired by split: 18 figures of nine sets")
    print(f"found: met {sum(whole)}, missed {len(whole) - sum(whole)}, not whole {18 - len(whole)}")


if __name__ == "__main__":
    app()
