"""A whole scoring, that can be cut off at any time and taken up again by the same command.

OUT is a folder of parts, or one file where its name ends with .csv or .parquet:

    OUT/part-00000.parquet ...   OUT.parquet
    OUT/_score.json              OUT.parquet.score.json   what was asked, and in the end what came of it
    OUT/_rejects.parquet         OUT.rejects.parquet      rows that the model cannot take, with the reason, if any
    OUT/_work/                   .OUT.parquet.work/       only while the work goes on

The state ties the parts to the files' digests, the model's version and the settings: another command over the same OUT
is refused. A part that is there is whole, and is not done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from models import contract
from serving import lean
from serving.errors import choices
from serving.scoring import sources
from serving.scoring.errors import RowRefused, ScoreError
from serving.scoring.parts import Outcome, Shelf, fits_csv, open_writer, publish, reject_schema, score_part, write_text
from serving.scoring.scorer import Form, Scorer, Settings
from serving.scoring.sources import KINDS, Kind, Part, Source

PART_ROWS = 65_536

# Endings of other files than can be written: who gives one wants no folder of that name. Any other is a folder's, as
# `scored.2026-11` and `run.v2`.
# fmt: off
_FOREIGN = frozenset((
    ".arrow", ".avro", ".feather", ".h5", ".hdf5", ".ipc", ".npy", ".npz", ".orc", ".parq", ".pickle", ".pkl", ".pq",
    ".dat", ".json", ".jsonl", ".ndjson", ".tab", ".tsv", ".txt", ".ods", ".xls", ".xlsx", ".db", ".sqlite",
    ".bz2", ".gz", ".lz4", ".xz", ".zip", ".zst",
))
# fmt: on


class ModelIdentity(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int
    # Of the manifest, and so of every file of the artifact.
    sha256: str


class Asked(BaseModel):
    """All that the output depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: ModelIdentity
    settings: Settings
    part_rows: int
    sources: list[Source]
    parts: list[Part]


class State(BaseModel):
    """`_score.json`. outcome: absent until all parts are done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: Asked
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Target:
    """Where the output goes."""

    out: Path
    shelf: Shelf
    state: Path
    rejects: Path
    is_file: bool

    @classmethod
    def choose(cls, out: Path, given: Kind) -> Target:
        """OUT's own name says whether it is a file; a folder's parts are of the input's kind. Raises ScoreError."""
        if out.suffix.lower() in _FOREIGN and not out.is_dir():
            raise ScoreError(f"{out}: a file in {out.suffix}, which is not written; wanted .csv, .parquet, or a folder")
        kind = KINDS.get(out.suffix.lower())
        if kind is None or out.is_dir():
            shelf = Shelf(out.absolute(), out.absolute() / "_work", Path.cwd(), given)
            return cls(out, shelf, out / sources.STATE, out / f"_rejects.{given}", is_file=False)
        work = out.absolute().with_name(f".{out.name}.work")
        # The whole name, as `x.csv`, `x.parquet` and `x.PARQUET` may stand side by side.
        state, rejects = out.with_name(f"{out.name}.score.json"), out.with_name(f"{out.stem}.rejects{out.suffix}")
        return cls(out, Shelf(work, work, Path.cwd(), kind), state, rejects, is_file=True)


@dataclass(frozen=True)
class Job:
    """A scoring that was checked as far as it can be before the model is loaded."""

    artifact: Path
    asked: Asked
    target: Target
    form: Form

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.asked.parts)

    def pending(self) -> list[Part]:
        return [part for part in self.asked.parts if not self.target.shelf.part(part).exists()]


def artifact(repository: Path, name: str, version: int | None) -> Path:
    """The folder of a model's version, the newest where none is asked for."""
    found = contract.versions(repository, name)
    if not found:
        known = choices(contract.model_names(repository)) or "none (`dropserve train sonar` makes one)"
        raise ScoreError(f"{repository}: no model {name!r}, found {known}")
    if version is not None and version not in found:
        raise ScoreError(
            f"{repository}: model {name!r} has no version {version}, wanted one of {choices(map(str, found))}"
        )
    return repository / name / str(found[-1] if version is None else version)


def plan(wanted: str, out: Path, artifact: Path, settings: Settings, part_rows: int) -> Job:
    """Find the files, cut them into parts and check their columns; raises ScoreError, ArtifactError."""
    files = sources.find(wanted)
    sources.check_name(out)
    _check_prefix(settings.prefix)
    target = Target.choose(out, sources.kind(files[0]))
    _check_apart(wanted, files, target)
    manifest = contract.read_manifest(artifact)
    columns = sources.schema(files[0])
    is_text, lists = sources.kind(files[0]) == "csv", target.shelf.kind != "csv"
    form = Form(manifest, settings, columns, str(files[0]), is_text=is_text, lists=lists)
    if target.shelf.kind == "csv":
        for field in form.schema:
            if not fits_csv(field.type):
                held = _in_words(field.type)
                raise ScoreError(
                    f"{out}: column {field.name!r} holds {held}, which CSV cannot; wanted a name in .parquet"
                )
    surveyed: list[Source] = []
    parts: list[Part] = []
    for file in files:
        if sources.schema(file) != columns:
            raise ScoreError(f"{file}: columns {choices(sources.schema(file).names)}; wanted those of {files[0]}")
        source, found = sources.survey(file, part_rows, len(parts))
        surveyed.append(source)
        parts += found
    if _is_matched(wanted, target, len(parts)):
        raise _not_apart(wanted, target)
    identity = ModelIdentity(name=manifest.name, version=manifest.version, sha256=manifest.sha256)
    asked = Asked(model=identity, settings=settings, part_rows=part_rows, sources=surveyed, parts=parts)
    return Job(artifact.absolute(), asked, target, form)


def _check_prefix(prefix: str) -> None:
    """Arrow's names of columns are UTF-8; what the shell gave need not be."""
    try:
        prefix.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(prefix).decode(errors="backslashreplace")
        raise ScoreError(f"--prefix: found {shown}, which is not UTF-8; wanted text") from error


def _in_words(held: pa.DataType) -> str:
    """The values of a type, without what is in a nested one: that may be long."""
    if pa.types.is_struct(held):
        return "structs"
    if pa.types.is_map(held):
        return "maps"
    return "lists" if pa.types.is_nested(held) and not pa.types.is_union(held) else f"values of type {held}"


# As many threads or workers score as there are cores: more of them in TensorFlow would only wait for each other.
ONE_THREAD_EACH = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


def load_scorer(artifact: Path, form: Form) -> Scorer:
    """The model, loaded: this brings TensorFlow."""
    os.environ.update(ONE_THREAD_EACH)
    lean.import_tensorflow()
    from serving.graph import prepare_device
    from serving.runtime import Model

    prepare_device("auto")
    return Scorer(Model.load(artifact, (form.signature,)), form)


Advance = Callable[[int], Any]
# Scores parts, and says so row by row; a part has its outcome on the shelf when it is done.
Engine = Callable[[Job, list[Part], bool, Advance], None]


def run_here(job: Job, pending: list[Part], strict: bool, advance: Advance) -> None:
    """The engine of this process: one part after the other, each by as many threads as there are cores."""
    scorer = load_scorer(job.artifact, job.form)
    threads = len(os.sched_getaffinity(0))
    for part in pending:
        score_part(scorer, part, job.target.shelf, threads=threads, strict=strict, advance=advance)


def run(job: Job, engine: Engine, *, strict: bool, advance: Advance) -> Outcome:
    """Do what is left of the job. Raises ScoreError where OUT belongs to another, RowRefused where `strict`."""
    target = job.target
    with _taken(target):
        state, is_new = _state(job)
        if strict:
            _check_none_rejected(job, state)
        if state.outcome is not None:
            shutil.rmtree(target.shelf.work, ignore_errors=True)
            advance(job.rows)
            return state.outcome
        pending = job.pending()
        advance(job.rows - sum(part.rows for part in pending))
        try:
            if pending:
                engine(job, pending, strict, advance)
        except RowRefused:
            if is_new:  # nothing of it would be of use
                _remove(job)
            raise
        return _finish(job)


def _check_none_rejected(job: Job, state: State) -> None:
    """A run before this one may have left out rows: it need not have been strict."""
    shelf = job.target.shelf
    if state.outcome is not None:
        found = [(job.target.rejects, state.outcome.rejected)]
    else:
        done = [part for part in job.asked.parts if shelf.part(part).exists()]
        found = [(shelf.rejects(part), _outcome(shelf, part).rejected) for part in done]
    for rejects, count in found:
        if count:
            raise RowRefused(f"{rejects}: rows rejected by an earlier run, {count:,}; wanted none, or no --strict")


def _outcome(shelf: Shelf, part: Part) -> Outcome:
    return Outcome.model_validate_json(shelf.outcome(part).read_bytes())


def _finish(job: Job) -> Outcome:
    """Put together what is one file in the end, and say that all is done."""
    target, parts = job.target, job.asked.parts
    outcomes = [_outcome(target.shelf, part) for part in parts]
    outcome = Outcome(scored=sum(one.scored for one in outcomes), rejected=sum(one.rejected for one in outcomes))
    target.rejects.unlink(missing_ok=True)
    if outcome.rejected:
        rejected = [target.shelf.rejects(part) for part, one in zip(parts, outcomes, strict=True) if one.rejected]
        _join(rejected, target.rejects, reject_schema(job.form.columns), target.shelf)
    if target.is_file:
        _join([target.shelf.part(part) for part in parts], target.out, job.form.schema, target.shelf)
    write_text(target.state, State(asked=job.asked, outcome=outcome).model_dump_json(indent=1), target.shelf.work)
    shutil.rmtree(target.shelf.work)
    return outcome


def _join(files: list[Path], place: Path, schema: pa.Schema, shelf: Shelf) -> None:
    aside = shelf.work / "joined.unfinished"
    if shelf.kind == "parquet":
        with open_writer(aside, schema, shelf.kind) as writer:
            for file in files:
                with pq.ParquetFile(file) as part:
                    for group in range(part.num_row_groups):
                        writer.write(part.read_row_group(group))
    else:
        with aside.open("wb") as joined:
            for number, file in enumerate(files):
                with file.open("rb") as part:
                    if number:
                        part.seek(_header_bytes(schema, shelf))
                    shutil.copyfileobj(part, joined)
    publish(aside, place)


def _header_bytes(schema: pa.Schema, shelf: Shelf) -> int:
    """Length of a CSV file's header; a name may have a line's end in it."""
    empty = shelf.work / "empty.unfinished"
    with pyarrow.csv.CSVWriter(empty, schema):
        pass
    return empty.stat().st_size


def _state(job: Job) -> tuple[State, bool]:
    """What was begun here, and whether it is begun now."""
    target = job.target
    if not target.state.exists():
        found = next(_strangers(target), None)
        if found is not None:
            raise ScoreError(f"{found}: is there already, from something else; wanted another OUT, or an empty folder")
        state = State(asked=job.asked)
        write_text(target.state, state.model_dump_json(indent=1), target.shelf.work)
        return state, True
    try:
        state = State.model_validate_json(target.state.read_bytes())
    except ValidationError as error:
        raise ScoreError(
            f"{target.state}: not the state of a scoring; wanted another OUT, or an empty folder"
        ) from error
    for name in Asked.model_fields:
        if getattr(state.asked, name) != getattr(job.asked, name):
            raise ScoreError(
                f"{target.out}: holds the scoring of {_difference(name, state.asked, job.asked)}; "
                "wanted another OUT, or this one removed"
            )
    if state.outcome is not None:
        written = (
            [target.out] if target.is_file else [target.out / target.shelf.part(part).name for part in job.asked.parts]
        )
        missing = next((path for path in written if not path.exists()), None)
        if missing is not None:
            remedy = "this file" if target.is_file else f"all of {target.out}"
            raise ScoreError(
                f"{target.state}: says that all is done, and {missing} is not there; "
                f"wanted another name for OUT, or {remedy} removed"
            )
    return state, False


def _difference(name: str, found: Asked, wanted: Asked) -> str:
    if name == "model":
        return f"model {found.model.name} {found.model.version}, not {wanted.model.name} {wanted.model.version}"
    if name == "settings":
        before, now = found.settings.model_dump(), wanted.settings.model_dump()
        others = [f"{key}={value!r}, not {now[key]!r}" for key, value in before.items() if value != now[key]]
        return f"other settings ({'; '.join(others)})"
    if name == "part_rows":
        return f"parts of {found.part_rows:,} rows, not {wanted.part_rows:,}"
    return "other files, or of files that have changed since"


def _strangers(target: Target) -> Iterator[Path]:
    """What is there already where the output is to be."""
    if target.is_file:
        # Parts without a state are of nobody knows which rows.
        parts = sorted(target.shelf.parts.glob("part-*"))
        return (path for path in (target.out, target.rejects, *parts) if path.exists())
    return (
        (path for path in target.out.iterdir() if path.name != target.shelf.work.name)
        if target.out.is_dir()
        else iter(())
    )


def _remove(job: Job) -> None:
    target = job.target
    for part in job.asked.parts:
        target.shelf.part(part).unlink(missing_ok=True)
    shutil.rmtree(target.shelf.work, ignore_errors=True)
    target.state.unlink(missing_ok=True)
    if not target.is_file:
        with contextlib.suppress(OSError):  # something else is in it by now
            target.out.rmdir()


@contextlib.contextmanager
def _taken(target: Target) -> Iterator[None]:
    """Nobody else works on the same OUT meanwhile; whoever is killed lets go of it."""
    try:
        target.shelf.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScoreError(
            f"{error.filename}: cannot be made ({error.strerror}); wanted a place for the output"
        ) from error
    descriptor = os.open(target.shelf.work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ScoreError(f"{target.out}: another scoring works on it now; wanted to wait for its end") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty: it holds what the next run needs
                target.shelf.work.rmdir()
    finally:
        os.close(descriptor)


def _check_apart(wanted: str, files: list[Path], target: Target) -> None:
    """The output must not become input when the same command runs again."""
    out, given = target.out.resolve(), Path(wanted)
    # A link is read as what it points to, and is a name in its own folder too.
    read = {file.resolve() for file in files} | {file.parent.resolve() / file.name for file in files}
    for own in (target.rejects, target.state):
        if own.resolve() in read:
            raise ScoreError(f"{own}: is input, and would be written beside {target.out}; wanted another name for OUT")
    inside = given.is_dir() and out.is_relative_to(given.resolve())
    over = out in read or (not target.is_file and any(file.is_relative_to(out) for file in read))
    # All parts are known once the files were read, which takes its time.
    if inside or over or _is_matched(wanted, target, 1):
        raise _not_apart(wanted, target)


def _not_apart(wanted: str, target: Target) -> ScoreError:
    return ScoreError(f"{target.out}: lies where the input is read from ({wanted}); wanted another place for OUT")


def _is_matched(wanted: str, target: Target, parts: int) -> bool:
    """Whether a pattern would find what is written, where that are so many parts."""
    given = Path(wanted)
    if given.exists():
        return False
    magic = next((place for place, part in enumerate(given.parts) if glob.has_magic(part)), len(given.parts))
    pattern = (*Path(*given.parts[:magic]).resolve().parts, *given.parts[magic:])
    out = target.out.resolve()
    written = [out] if target.is_file else [out / target.shelf.name(index) for index in range(parts)]
    rejects = target.rejects.parent.resolve() / target.rejects.name
    return any(_fits(place.parts, pattern) for place in (*written, rejects))


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """As `glob` does it: a star ends at a slash, two do not, and neither stands for a hidden name."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (not hidden and _fits(parts[1:], pattern))
    return not hidden and fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
