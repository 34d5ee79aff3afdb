"""The command `dropserve`. The folders are imported inside each command: `--help` waits for no TensorFlow."""

from __future__ import annotations

import sys

try:
    import contextlib
    import json
    import logging
    import os
    from collections.abc import Callable, Iterator
    from importlib.metadata import version
    from pathlib import Path
    from typing import Annotated, Any, NoReturn

    import typer
    from rich.progress import Progress, TextColumn
    from rich.text import Text
    from typer.core import TyperCommand

    from models import contract
    from models.calibration_settings import AS_USUAL, CalibrationSettings, Sets
    from serving.lean import import_tensorflow, nothing_to_collect
    from training.errors import InputError
    from training.progress import Reporter, literal_console
except KeyboardInterrupt:
    # As `main` has it, which is not there yet.
    print("interrupted", file=sys.stderr)
    sys.exit(130)

app = typer.Typer(
    name="dropserve",
    help="Keras models that say when they are guessing: train with dropout, export once, serve MC dropout uncertainty.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

RECIPE = "default: the recipe of DATA"
# Of a command that Ctrl-C ended: what shells take it for, and Typer.
INTERRUPTED = 130
# `--ray` without an address.
RAY_HERE = "local"
Repository = Annotated[
    Path,
    typer.Option("--repository", metavar="DIR", envvar="DROPSERVE_REPOSITORY", help="The model repository."),
]
# Of commands that have no use for it: who sets it for all of them is not refused.
UnusedRepository = Annotated[Path | None, typer.Option("--repository", metavar="DIR", hidden=True)]
NumSamples = Annotated[
    int,
    typer.Option(
        metavar="T",
        min=contract.MIN_NUM_SAMPLES,
        max=contract.MAX_NUM_SAMPLES,
        help="Draws of an answer, where whoever asks names no number.",
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="sonar, breast_cancer, wine, digits or diabetes; a .csv or .parquet file; a folder DIR/class/*.png.",
    ),
]
Target = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column to predict; a file has no default.")]
Types = Annotated[
    list[str] | None,
    typer.Option(
        "--type",
        metavar="COLUMN=KIND",
        help="A file's column is numeric, boolean, categorical or ignored, or nullable (',nullable'); repeatable.",
        show_default="seen in the values",
    ),
]
TaskOption = Annotated[
    contract.Task | None, typer.Option(help="What to make of a file's target.", show_default="seen in its values")
]
SetsOption = Annotated[
    Sets,
    typer.Option(help="Prediction sets: of the probable classes (lac), adaptive (aps), or lac for each class (class)."),
]
Coverage = Annotated[
    float,
    typer.Option(metavar="C", help="Share of rows whose set or interval holds the truth, where a request names none."),
]
MaxError = Annotated[
    float | None,
    typer.Option(metavar="E", help="Classes: withhold answers so that at most this share of the rest is wrong."),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="With which probability --max-error holds.", show_default=f"{AS_USUAL.confidence:g}"
    ),
]
CostRatio = Annotated[
    float | None, typer.Option(metavar="C", help="Classes: withhold answers where a wrong one costs C withheld ones.")
]
Ensemble = Annotated[
    int | None,
    typer.Option(metavar="M", help="Publish M such nets, trained from other seeds, that take turns at the draws."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and no progress.")]


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Import TensorFlow within."""
    with quiet(), nothing_to_collect():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TensorFlow's notes on CPU features, missing GPUs and old formats are no news here.

    Its C++ side writes some of them to file descriptor 2 whatever the log level.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
    logging.getLogger("absl").setLevel(logging.ERROR)


class Interrupted(Exception):
    """Ctrl-C; `str()` is one line that says what is left of the work."""


@contextlib.contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Raise Interrupted for Ctrl-C within. left: called then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted(left()) from interrupt


def publication(repository: Path, name: str) -> Callable[[], str]:
    """What says, whenever it is called, whether a version of the model has been published since."""
    before = contract.versions(repository, name)

    def said() -> str:
        new = [number for number in contract.versions(repository, name) if number not in before]
        return f"{name} {new[-1]} was published already" if new else "nothing was published"

    return said


def print_version(asked: bool) -> None:
    if asked:
        print(f"dropserve {version('dropserve')}")
        raise typer.Exit


def asked_calibration(
    sets: Sets, max_error: float | None, confidence: float | None, cost_ratio: float | None, coverage: float
) -> CalibrationSettings:
    """What the options ask for. Raises InputError, SettingsError."""
    if confidence is None:
        confidence = AS_USUAL.confidence
    elif max_error is None:
        raise InputError(
            f"--confidence {confidence:g} without --max-error: it is that promise's; wanted both or neither"
        )
    return CalibrationSettings(sets, max_error, confidence, cost_ratio, coverage)


@app.callback()
def dropserve(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    data: Data,
    target: Target = None,
    types: Types = None,
    task: TaskOption = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model; default: DATA's.")] = None,
    visible_dropout: Annotated[
        float | None, typer.Option(metavar="R", help=f"Share of the inputs to drop, 0 <= R < 1; {RECIPE}.")
    ] = None,
    hidden_dropout: Annotated[
        float | None, typer.Option(metavar="R", help=f"Share of the hidden units to drop, 0 <= R < 1; {RECIPE}.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Passes over the training rows; {RECIPE}.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Same seed, same weights.")] = 0,
    num_samples: NumSamples = contract.DEFAULT_NUM_SAMPLES,
    compare: Annotated[
        bool, typer.Option("--compare", help="Set the nets without dropout, and with it in one place only, beside it.")
    ] = False,
    concrete: Annotated[
        bool,
        typer.Option(
            "--concrete",
            help="Learn the rates (Concrete Dropout) where there is dropout, from those given on, else from 0.1.",
        ),
    ] = False,
    ensemble: Ensemble = None,
    heteroscedastic: Annotated[
        bool, typer.Option("--heteroscedastic", help="Regression: learn each row's own noise beside its mean.")
    ] = False,
    sets: SetsOption = "lac",
    coverage: Coverage = contract.DEFAULT_COVERAGE,
    max_error: MaxError = None,
    confidence: Confidence = None,
    cost_ratio: CostRatio = None,
    repository: Repository = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Train a network with dropout on DATA and publish it, with its MC dropout variant, as the next version of NAME."""
    from training.datasets import DATASETS
    from training.plan import plan

    request = plan(
        data,
        target=target,
        types=types or (),
        task=task,
        name=name,
        visible_dropout=visible_dropout,
        hidden_dropout=hidden_dropout,
        epochs=epochs,
        seed=seed,
        num_samples=num_samples,
        compare=compare,
        concrete=concrete,
        ensemble=ensemble,
        heteroscedastic=heteroscedastic,
        calibration=asked_calibration(sets, max_error, confidence, cost_ratio, coverage),
        repository=repository,
    )
    with interruptible(publication(repository, request.name)):
        with quiet_start():
            from training import pipeline, summary

        if not as_json:
            print(summary.understood(request.data))
            if request.data.name not in DATASETS and request.data.columns:
                literal_console().print(summary.columns(request.data))

        published = pipeline.train(request, Reporter(quiet=as_json))
        if as_json:
            print(json.dumps(summary.document(published), indent=2))
        else:
            print(summary.sentences(published))
            literal_console().print(summary.table(published))


@app.command()
def study(
    data: Data,
    target: Target = None,
    types: Types = None,
    task: TaskOption = None,
    folds: Annotated[int, typer.Option(metavar="K", min=2, max=100, help="Parts of one cross-validation.")] = 10,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, max=100, help="Cross-validations, each with other folds.")
    ] = 10,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Passes over the training rows; {RECIPE}.")
    ] = None,
    num_samples: NumSamples = 50,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**31, help="Same seed, same folds and nets.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the report, one HTML page.")] = None,
    as_json: Json = False,
    repository: UnusedRepository = None,
) -> None:
    """Does dropout help on DATA? Nets without it, with it here or there, and tuned, under repeated cross-validation."""
    from training.plan import check_report, dataset
    from training.recipes import changed, recipe_of

    if report is not None:
        check_report(report)
    loaded = dataset(data, target, types or (), task)
    base = changed(recipe_of(loaded), epochs=epochs)
    with interruptible(lambda: "nothing is kept of a study that is not done"):
        with quiet_start():
            from training import cores, study_report, study_summary
            from training.study import study as carry_out

        cores.one_thread_an_operation()
        with Reporter(quiet=as_json).share(f"study of {loaded.name}") as on_progress:
            found = carry_out(
                loaded,
                base,
                folds=folds,
                repeats=repeats,
                num_samples=num_samples,
                seed=seed,
                on_progress=on_progress,
            )
    if report is not None:
        report.write_text(study_report.page(found), encoding="utf-8")
    if as_json:
        print(json.dumps(study_summary.document(found), indent=2))
        return
    console = literal_console()
    console.print(study_summary.figures_table(found))
    print()
    console.print(study_summary.comparisons_table(found))
    print(f"\n{study_summary.sentences(found)}\n\n{study_summary.overfitting(found)}")


@app.command()
def tune(
    data: Data,
    target: Target = None,
    types: Types = None,
    task: TaskOption = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model; default: DATA's.")] = None,
    trials: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of each search, by all processes that share the storage.")
    ] = 30,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=1, help="Seconds for all searches.", show_default="none")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="nll, accuracy or brier; rmse for regression.", show_default="nll or rmse"),
    ] = None,
    dimensions: Annotated[
        str, typer.Option("--search", metavar="A,B,...", help="Also width, max-norm, learning-rate, epochs.")
    ] = "",
    folds: Annotated[int, typer.Option(metavar="K", min=2, max=100, help="Of a trial.")] = 5,
    outer_folds: Annotated[
        int, typer.Option(metavar="K", min=0, max=100, help="In each the search is repeated, and judged; 0: not.")
    ] = 3,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Passes over the training rows; {RECIPE}.")
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="URL", help="Database of the trials: an interrupted search goes on from there.")
    ] = "sqlite:///dropserve-tune.db",
    worker: Annotated[
        bool, typer.Option("--worker", help="Help another process with its trials; publish nothing.")
    ] = False,
    ensemble: Ensemble = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**31, help="Same seed, same trials.")] = 0,
    num_samples: NumSamples = contract.DEFAULT_NUM_SAMPLES,
    repository: Repository = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Find the dropout rates that suit DATA, judge them on rows that the search never saw, publish the winner."""
    from dataclasses import replace

    from training.plan import plan

    request = plan(
        data,
        target=target,
        types=types or (),
        task=task,
        name=name,
        epochs=epochs,
        seed=seed,
        num_samples=num_samples,
        ensemble=ensemble,
        repository=repository,
    )
    published = publication(repository, request.name)
    with interruptible(lambda: f"{published()}; the same command goes on with the trials that are done"):
        with quiet_start():
            from training import cores, pipeline, summary, tune_summary
            from training import tune as tuning
            from training.collapse import TRIES
            from training.errors import InputError
            from training.splits import split

        if request.recipe.architecture == "dense":
            # A trial has few nets: only with convolutions are its operations long enough for several threads.
            cores.one_thread_an_operation()
        if outer_folds == 1:
            raise InputError("--outer-folds 1: one fold cannot judge a search; wanted 0, or 2 and more")
        wanted = tuple(part.strip() for part in dimensions.split(",") if part.strip())
        settings = tuning.Settings(
            space=tuning.Space(request.recipe, wanted),
            objective=tuning.check(request.data, objective, wanted),
            trials=trials,
            folds=folds,
            outer_folds=outer_folds,
            num_samples=tuning.SCORE_DRAWS,
            seed=seed,
            timeout_s=timeout,
            storage=storage,
            name=request.name,
        )
        rows = split(request.data.y, request.data.task).train
        for note in tuning.rare_classes(request.data, rows, settings):
            print(f"note: {note}", file=sys.stderr)
        reporter = Reporter(quiet=as_json)
        with reporter.trials(request.name, trials) as on_progress:
            found = tuning.tune(request.data, rows, settings, on_progress)
        if worker:
            print(json.dumps(tune_summary.document(found, settings)) if as_json else "the trials are done")
            return
        model = pipeline.train(replace(request, recipe=found.recipe, tries=TRIES), reporter)
        if as_json:
            print(json.dumps(summary.document(model) | {"tuning": tune_summary.document(found, settings)}, indent=2))
        else:
            print(tune_summary.sentences(found, settings))
            print(summary.sentences(model))
            literal_console().print(summary.table(model))


@app.command()
def package(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A file that Keras saved: .keras or .h5.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the model.")],
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DATA.npz", help="Held-out rows: `x`, or one array per input name, and `y`."),
    ] = None,
    labels: Annotated[str | None, typer.Option(metavar="A,B,...", help="The classes, in the output's order.")] = None,
    task: Annotated[
        contract.Task | None, typer.Option(help="What the outputs are.", show_default="seen in them")
    ] = None,
    num_samples: NumSamples = contract.DEFAULT_NUM_SAMPLES,
    seed: Annotated[
        int, typer.Option(metavar="N", min=-(2**63), max=2**63 - 1, help="Of the draws, where whoever asks names none.")
    ] = contract.DEFAULT_SEED,
    masks: Annotated[
        contract.Masks, typer.Option(help="Of the default answer: balanced ones have half the Monte Carlo variance.")
    ] = "independent",
    precision: Annotated[
        contract.Precision, typer.Option(help="Of the draws: bfloat16 is faster where products dominate, to 3 digits.")
    ] = "float32",
    sets: SetsOption = "lac",
    coverage: Coverage = contract.DEFAULT_COVERAGE,
    max_error: MaxError = None,
    confidence: Confidence = None,
    cost_ratio: CostRatio = None,
    repository: Repository = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Publish a trained Keras model, with its MC dropout variant, as the next version of NAME."""
    with quiet_start():
        from models import bento_store, findings
        from models.package import package as publish_file

    classes = [label.strip() for label in labels.split(",")] if labels is not None else None
    with literal_console(stderr=True).status(Text(f"packaging {model.name}")):
        folder = publish_file(
            model,
            name=name,
            repository=repository,
            calibration=calibration,
            task=task,
            labels=classes,
            num_samples=num_samples,
            seed=seed,
            masks=masks,
            precision=precision,
            calibration_settings=asked_calibration(sets, max_error, confidence, cost_ratio, coverage),
        )
        tag = bento_store.import_artifact(folder)
    manifest = contract.read_manifest(folder)
    if as_json:
        shown = {"name", "version", "inputs", "outputs", "stochastic_layers", "num_samples", "seed", "metrics"}
        document = manifest.model_dump(mode="json", include=shown) | {"folder": str(folder), "bento_tag": tag}
        print(json.dumps(document, indent=2))
    else:
        print(f"Published {manifest.name} {manifest.version} in {folder}, and in BentoML's store as {tag}.")
        for metric, value in manifest.metrics.get("calibration", {}).items():
            print(f"  {metric} {value:.3g} on the calibration rows, dropout off")
        for line in findings.sentences(manifest.calibration) if manifest.calibration is not None else ():
            print(f"  {line}")


@app.command()
def models(repository: Repository = Path("artifacts"), as_json: Json = False) -> None:
    """List what is in the repository, and whether its files are as they were published."""
    from training import inventory

    items = inventory.read(repository)
    if as_json:
        print(json.dumps([inventory.document(item) for item in items], indent=2))
    elif items:
        console = literal_console()
        console.print(inventory.shown(items, console))
    else:
        print(f"no models in {repository}: `dropserve train sonar` makes one")


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="As for train (of a bundled data set its test rows, of a file all rows), or an .npz as for package.",
        ),
    ],
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", min=1, help="Its version.", show_default="the newest")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="A file's column with the answers.", show_default="what is left"),
    ] = None,
    subgroup: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Judge the rows of each value of this column on their own.")
    ] = None,
    outliers: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Rows unlike the model's, without answers: what should be told from the rest."
        ),
    ] = None,
    repository: Repository = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Judge NAME on held-out rows: its deterministic, Monte Carlo and calibrated answers side by side."""
    from training import held_out
    from training.inventory import published

    folder = published(repository, name, version)
    manifest = contract.verify(folder)
    if any(given.lower().endswith(held_out.NPZ) for given in (data, outliers or "")):
        with quiet_start():
            import models.holdout  # noqa: F401  # loads TensorFlow
    held = held_out.read(data, manifest, target=target, subgroup=subgroup)
    named = held_out.outliers(outliers, manifest) if outliers is not None else {}
    with quiet_start():
        from training import assessment, assessment_summary
        from training.artifact_answers import Artifact

    # TensorFlow has notes on a graph when it first runs, too.
    with Reporter(quiet=as_json).step(f"judging {name} {manifest.version}"), quiet():
        judged = assessment.assess(Artifact(folder, manifest), held, named)
    if as_json:
        print(json.dumps(assessment_summary.document(manifest, held, judged), indent=2, allow_nan=False))
        return
    console = literal_console()
    for number, one in enumerate(judged):
        if number:
            print()
        print(assessment_summary.title(manifest, held, one, several=len(judged) > 1))
        for table in assessment_summary.tables(held, one):
            print()
            console.print(table)
        print()
        for sentence in assessment_summary.sentences(held, one):
            print(f"- {sentence}")


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="DROPSERVE_MODEL",
            help="The model of /predict and /uncertainty.",
            show_default="the only one",
        ),
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="Where HTTP is answered.")] = 3000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "0.0.0.0",
    repository: Repository = Path("artifacts"),
) -> None:
    """Serve a model: `bentoml serve`, set up. All other settings are environment variables (DROPSERVE_...)."""
    from serving.errors import StartError
    from serving.launch import launch

    try:
        launch(repository=repository, model=model, host=host, port=port)
    except StartError as error:
        raise InputError(str(error)) from error


class _ScoreCommand(TyperCommand):
    """`--ray` with an address or without, which Typer alone does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        if "--ray" in given:
            following = given.index("--ray") + 1
            if following == len(given) or not _is_ray_address(given[following]):
                given.insert(following, RAY_HERE)
        return super().parse_args(ctx, given)


def _is_ray_address(text: str) -> bool:
    return text in (RAY_HERE, "auto") or (":" in text and not Path(text).exists())


@app.command(cls=_ScoreCommand)
def score(
    rows: Annotated[str, typer.Argument(metavar="IN", help="A Parquet or CSV file, a folder of them, or a pattern.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder of parts, or one file: a name in .parquet or .csv.")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="The model.")],
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", min=1, help="Its version.", show_default="the newest")
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            min=contract.MIN_NUM_SAMPLES,
            max=contract.MAX_NUM_SAMPLES,
            help="Draws of each row.",
            show_default="the model's own",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=-(2**63), max=2**63 - 1, help="Of the draws.", show_default="the model's own"),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            metavar="C",
            help="Share of rows whose prediction set or interval holds the truth; of calibrated models.",
            show_default="the model's own",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first row that the model cannot take, with exit code 2.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Score on Ray: on this machine's cores, or on the cluster at ADDRESS, which must see the same files.",
            show_default=False,
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Put before the names of the columns added.")] = "",
    part_rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows of a part of the output: what is lost at most when cut off.")
    ] = 65_536,
    repository: Repository = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Add uncertainty columns to all rows of Parquet or CSV files. Cut off, the same command goes on where it was."""
    from serving.scoring import job as scoring
    from serving.scoring.errors import ScoreError
    from serving.scoring.scorer import Settings

    if coverage is not None and not 0 < coverage < 1:
        raise InputError(f"--coverage: found {coverage:g}, wanted a number between 0 and 1")
    try:
        artifact = scoring.artifact(repository, model, version)
        manifest = contract.read_manifest(artifact)
        settings = Settings(
            num_samples=manifest.num_samples if num_samples is None else num_samples,
            seed=manifest.seed if seed is None else seed,
            prefix=prefix,
            coverage=coverage,
        )
        planned = scoring.plan(rows, out, artifact, settings, part_rows)
        engine: scoring.Engine = scoring.run_here
        if ray is not None:
            from serving.scoring import on_ray

            engine = on_ray.engine(None if ray == RAY_HERE else ray)
        columns = (*Progress.get_default_columns(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"))
        console = literal_console(stderr=True)
        with (
            Progress(*columns, console=console, disable=as_json or not console.is_terminal, transient=True) as progress,
            interruptible(lambda: "the same command goes on with the parts that are not done"),
        ):
            task = progress.add_task("scoring", total=planned.rows)
            if ray is None:
                # Here, where TensorFlow's notes are kept off the terminal.
                with quiet_start():
                    import_tensorflow()
            outcome = scoring.run(planned, engine, strict=strict, advance=lambda done: progress.advance(task, done))
    except ScoreError as error:
        raise InputError(str(error)) from error
    rejects = str(planned.target.rejects) if outcome.rejected else None
    if as_json:
        counts = {"rows": outcome.scored, "rejected": outcome.rejected, "out": str(out), "rejects": rejects}
        counts |= {"warnings": list(planned.form.warnings)}
        identity = {"name": manifest.name, "version": str(manifest.version)}
        print(json.dumps({"model": identity, **settings.model_dump(exclude={"prefix"}), **counts}, indent=2))
    else:
        for warning in planned.form.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{contract.counted(outcome.scored, 'row')} scored by {manifest.name} {manifest.version} in {out}")
        if rejects:
            print(f"{contract.counted(outcome.rejected, 'row')} rejected, with the reason, in {rejects}")


@app.command()
def route(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    pin: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Answers all that names no version; `none`: the newest does.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=VERSION", help="Name a version; may be given again.")
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(metavar="VERSION:SHARE", help="Answers a share of what names no version; `none` ends it."),
    ] = None,
    shadow: Annotated[
        str | None,
        typer.Option(metavar="VERSION[:SHARE]", help="Answers nobody, and is compared with what does; `none` ends it."),
    ] = None,
    repository: Repository = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Choose which versions of NAME answer; without options, show it.

    Running servers follow within seconds. One that cannot load a version keeps what it has, and says why in its log.
    """
    from serving.errors import StartError
    from serving.route import reroute, sentences

    try:
        routing = reroute(repository, name, pin=pin, labels=label or (), canary=canary, shadow=shadow)
    except StartError as error:
        raise InputError(str(error)) from error
    if as_json:
        print(routing.model_dump_json(indent=2))
    else:
        print(sentences(repository, name, routing))


@app.command()
def loadtest(
    host: Annotated[str, typer.Option(metavar="URL", help="The server.")] = "http://127.0.0.1:3000",
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="The traffic: smoke, ramp, spike, soak or mixed.")
    ] = "smoke",
    users: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Requests at once, at most.", show_default="the profile's")
    ] = None,
    spawn_rate: Annotated[
        float | None, typer.Option(metavar="R", min=0.01, help="New users a second.", show_default="the profile's")
    ] = None,
    run_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="As 20s, 5m, 1h.", show_default="the profile's")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", min=0.01, help="Requests a second, by a schedule.", show_default="the profile's"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:WEIGHT",
            help="Share of the requests for this model; once for each of several.",
            show_default="all to the one that answers where none is named",
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="CSV or JSON file of rows to send; NAME=FILE for one of several models.",
            show_default="Sonar's where they fit the model, else the server's own examples",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="The CSV file's column that is not a feature; NAME=COLUMN likewise."),
    ] = None,
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that send.")] = 1,
    grpc: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The server's gRPC port, for the mixed profile.")
    ] = "127.0.0.1:8500",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots.")] = None,
    as_json: Json = False,
    repository: UnusedRepository = None,
) -> None:
    """Put load on a running server, check every answer, and end with exit code 1 where one was wrong."""
    from loadtest import verdict
    from loadtest.errors import LoadTestError
    from loadtest.profile import choose

    try:
        traffic = choose(profile, users=users, spawn_rate=spawn_rate, run_time=run_time, rate=rate)
        with literal_console(stderr=True).status(Text(f"{profile} on {host}, {traffic.seconds:g} s a run")):
            result = verdict.measure(
                host.rstrip("/"),
                traffic,
                rows or (),
                target or (),
                models=model or (),
                processes=processes,
                grpc=grpc,
            )
        if html is not None:
            from loadtest import page

            page.write(result, traffic, html)
    except LoadTestError as error:
        raise InputError(str(error)) from error
    if as_json:
        print(json.dumps(result.document(), indent=2))
    else:
        # Where it is piped or kept, names are not to be broken.
        literal_console(width=None if sys.stdout.isatty() else 100).print(result.table())
    raise typer.Exit(0 if result.passed else 1)


def main() -> NoReturn:
    """Run the command line: bad input ends with exit code 2 and one line on standard error, Ctrl-C with 130 and one."""
    try:
        # Not standalone: Typer would print usage and hints around its error.
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        sys.exit(code)
    except Interrupted as interrupted:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        # Before Typer looks out for it.
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (InputError, contract.ArtifactError) as error:
        message = str(error)
    except typer.TyperException as error:
        message = error.format_message()
    print(f"error: {contract.one_line(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
