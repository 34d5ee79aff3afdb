"""What crosses the border between training and serving: names, the manifest, and its verification.

Needs pydantic and nothing else: no Keras, no TensorFlow. Serving imports this module and no other of `models`.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

FORMAT = 1

MANIFEST_FILE = "manifest.json"
SAVED_MODEL_FILE = "saved_model.pb"
KERAS_FILE = "model.keras"
HDF5_FILE = "model.h5"
WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
REPORT_FILE = "report.html"

SERVING_DEFAULT = "serving_default"
MC_PREDICT = "mc_predict"
MC_SAMPLE = "mc_sample"
MC_DRAWS = "mc_draws"
SIGNATURES = (SERVING_DEFAULT, MC_PREDICT, MC_SAMPLE, MC_DRAWS)
# Not a signature: a function of the loaded module,
# `loaded.mc_adaptive(**inputs, seed=..., tolerance=..., max_samples=...)`.
MC_ADAPTIVE = "mc_adaptive"
# Nor these: `mc_predict` for a number of rows within bounds, without the graph's own choices.
MC_PREDICT_ROWS = "mc_predict_rows_{least}_to_{most}"
# All that the server calls.
FUNCTIONS = (*SIGNATURES, MC_ADAPTIVE)

NUM_SAMPLES = "num_samples"
SEED = "seed"
TOLERANCE = "tolerance"
MAX_SAMPLES = "max_samples"
# Output of `mc_adaptive` beside `num_samples`, the draws of each row: whether the row reached the tolerance.
CONVERGED = "converged"
# Outputs of the draws' signatures that follow from calibration.
PREDICTION_SET = "prediction_set"
INTERVAL_LOWER = "interval_lower"
INTERVAL_UPPER = "interval_upper"
ABSTAIN = "abstain"
NOVELTY = "novelty"
# Outputs whose names end so are ends of intervals, behind the output's own prefix: they alone may be infinite.
ENDS = ("lower", "upper")
# Names that a model's own input may not have: they are arguments of the signatures.
RESERVED_INPUT_NAMES = frozenset({NUM_SAMPLES, SEED, TOLERANCE, MAX_SAMPLES})

TABLE_INPUT = "features"
IMAGE_INPUT = "image"

DEFAULT_NUM_SAMPLES = 100
DEFAULT_SEED = 0
# A standard deviation needs two draws.
MIN_NUM_SAMPLES = 2
# Positions in a stream of draws are counted in 63 bits; int32 is what the signature takes.
MAX_NUM_SAMPLES = 2**31 - 1

# Quantiles are read from the first draws only, so that memory stays bounded however many draws are asked for.
QUANTILE_DRAWS = 1000
# Of these draws, values of all rows of one call at most, beyond its first row: the graph has them three times or so, as
# float32. Whoever calls with more rows makes several calls.
CALL_DRAWN_VALUES = 2**26

# In the place of a class, at a place of a row that has none: it was padded to the others' length.
NO_CLASS = -1

# Of prediction sets and intervals, where none is asked for.
DEFAULT_COVERAGE = 0.9

# Levels of the quantiles of an UncertaintyReference: ten bins of equal weight.
REFERENCE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Names in one line of a message at most.
MAX_LISTED = 20

# Of the CSV files that training reads, and scoring.
CSV_DELIMITERS = ",;\t"
# A file without a line's end is not read as a whole.
_MAX_HEADER = 1_000_000

_VERSION_DIGITS = 19
NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")

Task = Literal["classification", "regression"]
# How the kept masks of the default seed are made: each unit dropped independently, or in exactly its rate's share of
# the default number of draws.
Masks = Literal["independent", "balanced"]
# In what the draws are computed; the deterministic signature is always the trained network's own.
Precision = Literal["float32", "bfloat16"]


class ArtifactError(Exception):
    """An artifact cannot be used. `str()` is one line: the file, what was found, what is wanted."""


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Feature(_Typed):
    """One column of a table."""

    name: str
    kind: Literal["numeric", "boolean", "categorical"]
    nullable: bool = False
    # Range seen in training; information for people and drift checks, never a reason to refuse a value.
    minimum: float | None = None
    maximum: float | None = None
    # Categories seen in training, for kind "categorical".
    categories: list[str] | None = None
    unit: str | None = None


class ModelInput(_Typed):
    """One input tensor of the signatures."""

    name: str
    # TensorFlow's name: float32, int64, string, bool, ...
    dtype: str
    # Per-row shape, without the rows' axis; None is a free axis.
    shape: list[int | None]
    # The table's columns, in order: all of them for the input `features`, one for an input that is a column of its own.
    features: list[Feature] | None = None
    unit: str | None = None


class ModelOutput(_Typed):
    """One output of the network and what is reported of it."""

    # The network's own output name.
    name: str
    # Prefix of its tensors in the signatures: "" for a single output, "<name>_" with several.
    prefix: str = ""
    task: Task
    # Per-row shape of the answer, without the rows' axis: [K] classes for classification, of several places in a row
    # [..., K]; [] or [D], or more axes, for regression.
    shape: list[int | None]
    labels: list[str] | None = None
    unit: str | None = None
    # Regression: whether the signatures carry `aleatoric_std` and `std`.
    has_aleatoric: bool = False


class StochasticLayer(_Typed):
    """A layer whose randomness makes the draws."""

    # Its number in the random stream: fixed by its place in the network.
    index: int
    # Path of layer names from the model down, joined by "/".
    path: str
    kind: str
    # The layer's own settings: rate, stddev, noise_shape, recurrent_dropout, ...
    settings: dict[str, Any]


class SignatureTensor(_Typed):
    name: str
    dtype: str
    # With the rows' axis; None is a free axis.
    shape: list[int | None]


class Signature(_Typed):
    inputs: list[SignatureTensor]
    outputs: list[SignatureTensor]


Share = Annotated[float, Field(ge=0, le=1)]


def _ascending(values: list[float]) -> list[float]:
    if any(later < earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError("numbers that do not ascend")
    return values


# A statistic's quantiles at REFERENCE_LEVELS.
Quantiles = Annotated[
    list[FiniteFloat],
    Field(min_length=len(REFERENCE_LEVELS), max_length=len(REFERENCE_LEVELS)),
    AfterValidator(_ascending),
]


class UncertaintyReference(_Typed):
    """How uncertain one output's answers were on the held-out calibration rows, with the artifact's default draws.

    What a server compares its traffic with: the share of its answers between two neighbouring quantiles should stay a
    tenth. Statistics are those of `mc_sample`, one number a row; what an output does not have is absent.
    """

    # Classification; nats.
    predictive_entropy: Quantiles | None = None
    mutual_information: Quantiles | None = None
    # Regression with one number a row; in the target's unit.
    epistemic_std: Quantiles | None = None
    # Distance in the deterministic prefix's features; 1 is the median of the rows that the features were fitted on.
    novelty: Quantiles | None = None
    # Share of the calibration rows on which the answer was withheld.
    abstention_share: Share | None = None


class Temperature(_Typed):
    """Every draw's probabilities are raised to 1 / value and normalised anew, in the graph of the MC signatures.

    It is applied only where it made the negative log-likelihood better in a cross-validation over the calibration rows;
    elsewhere `value` is 1 and the figures say why.
    """

    kind: Literal["temperature"] = "temperature"
    value: Annotated[float, Field(gt=0)]
    # Mean negative log-likelihood of the served mean of the draws, nats: as trained, and cross-validated with it.
    nll_before: float
    nll_after: float
    # Expected calibration error in 15 bins of equal width, likewise.
    ece_before: float
    ece_after: float


class Noise(_Typed):
    """What the draws do not vary with: the target's own noise, in the target's unit, in the graph of the MC signatures.

    std is None where the network has a variance head of its own, whose standard deviation is multiplied by `scale`;
    elsewhere it is the noise of every row, and `scale` is 1.
    """

    kind: Literal["noise"] = "noise"
    std: Annotated[float, Field(ge=0)] | None
    scale: Annotated[float, Field(gt=0)] = 1.0
    # Mean negative log-likelihood of the calibration rows, cross-validated: with the residuals' root mean square as the
    # only noise (for a head: with scale 1), and as served.
    nll_before: float
    nll_after: float


class TargetNoises(_Typed):
    """The noise of each number of a row, of an output with several: as if each had a network of its own."""

    kind: Literal["noises"] = "noises"
    targets: Annotated[list[Noise], Field(min_length=1)]


class ConformalScores(_Typed):
    """Scores of the calibration rows, from which a prediction set of any coverage follows (split conformal prediction).

    lac: 1 - probability of the true class (Sadinle, Lei & Wasserman 2019). aps: sum of the probabilities of the classes
    that are at least as probable as the true one (Romano, Sesia & Candes 2020, without randomisation). interval:
    |target - mean| / std. A class (or a value) belongs to the set where its own score is at most `threshold(coverage)`.
    The coverage of several numbers a row is each one's: all of them are inside at once less often.
    """

    kind: Literal["lac", "aps", "interval"]
    # Ascending. One list for all rows; with `by_class` one for each label's rows, in the labels' order; of several
    # numbers a row one for each number.
    scores: list[Annotated[list[FiniteFloat], AfterValidator(_ascending)]]
    by_class: bool = False

    def thresholds(self, coverage: float) -> list[float]:
        """The score of rank ceil((n + 1) coverage) of each list; infinite where its rows are too few for the coverage.

        An infinite threshold is the full set: the guarantee holds, and says nothing.
        """
        found = []
        for scores in self.scores:
            # Rounded, so that 0.9 * 10 is 9 and not a little more.
            rank = max(math.ceil(round((len(scores) + 1) * coverage, 9)), 1)
            found.append(scores[rank - 1] if rank <= len(scores) else math.inf)
        return found

    def rows_wanted(self, coverage: float) -> int:
        """The fewest calibration rows that can show this coverage."""
        return math.ceil(round(coverage / (1 - coverage), 9))


class Abstention(_Typed):
    """When an answer is withheld: a statistic beyond its threshold.

    confidence: the largest of the mean probabilities, withheld below the threshold; std: the predictive standard
    deviation, withheld above it. Without `max_error` the threshold withholds the most uncertain twentieth of the
    calibration rows, and promises nothing.
    """

    statistic: Literal["confidence", "std"]
    threshold: FiniteFloat
    # Promise: among answers that are given at most this share is wrong ...
    max_error: Share | None = None
    # ... which holds with this probability over the draw of the calibration rows.
    confidence: Share | None = None
    # On the calibration rows: the share of answers given, and the share of those that was wrong (classification).
    answered_share: Share
    error: Share | None = None


class OutputCalibration(_Typed):
    """One output's calibration. What its shape or its rows do not allow is absent."""

    fit: Temperature | Noise | TargetNoises | None = Field(default=None, discriminator="kind")
    conformal: ConformalScores | None = None
    abstention: Abstention | None = None
    reference: UncertaintyReference = UncertaintyReference()
    # One sentence for each thing that people must know: what stayed off and why, what is guaranteed for too few rows.
    warnings: list[str] = []


class Calibration(_Typed):
    """What was learned from held-out rows, with the draws that are served: the artifact's num_samples and seed."""

    rows: Annotated[int, Field(ge=1)]
    # Coverage of the signatures' `prediction_set` or interval, and of answers to requests that name none.
    coverage: Annotated[float, Field(gt=0, lt=1)] = DEFAULT_COVERAGE
    # By the output's name.
    outputs: dict[str, OutputCalibration]


class TrainingData(_Typed):
    """Which rows made the model."""

    name: str
    sha256: str
    rows: int
    train_rows: int
    calibration_rows: int
    test_rows: int
    attribution: str | None = None


class FileDigest(_Typed):
    bytes: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    """The path unchanged if it stays inside the artifact: relative, forward slashes, no `..`."""
    parts = path.split("/")
    if path == MANIFEST_FILE or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"file {path!r} does not lie inside the artifact")
    return path


class Manifest(_Typed):
    """`manifest.json`: all that a server or a person must know of an artifact without opening its graph."""

    format: Literal[1] = 1
    name: str
    version: Annotated[int, Field(ge=1)]
    created: str
    description: str = ""
    inputs: list[ModelInput]
    outputs: list[ModelOutput]
    stochastic_layers: list[StochasticLayer]
    num_samples: Annotated[int, Field(ge=MIN_NUM_SAMPLES, le=MAX_NUM_SAMPLES)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    masks: Masks = "independent"
    precision: Precision = "float32"
    # Networks of an ensemble: draw t is of member t mod members, the deterministic answer their mean. The stochastic
    # layers listed are the first member's; the others have the same, and the same streams.
    members: Annotated[int, Field(ge=1)] = 1
    signatures: dict[str, Signature]
    # Absent until the artifact is calibrated on held-out rows.
    calibration: Calibration | None = None
    # Figures on held-out rows: {"test": {"accuracy": ...}, ...}.
    metrics: dict[str, dict[str, float]] = {}
    training_data: TrainingData | None = None
    # How the network was trained, for people: optimizer, epochs, rates, seed, ...
    training: dict[str, Any] = {}
    # A few rows in the JSON form of `instances`: they make the working examples of the pages and the warm-up.
    examples: list[Any]
    library_versions: dict[str, str]
    # Every file but the manifest itself, by its path inside the artifact.
    files: dict[Annotated[str, AfterValidator(_inside)], FileDigest]
    # SHA-256 of the manifest's own bytes with this value replaced by 64 zeros.
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = "0" * 64

    @property
    def is_table(self) -> bool:
        """Whether the rows are a table's: `features` in one tensor, or one tensor a column."""
        return all(item.features is not None for item in self.inputs)

    def calibrated(self, output: ModelOutput) -> OutputCalibration | None:
        """What the calibration rows say of one output; None where there were none."""
        return self.calibration.outputs.get(output.name) if self.calibration is not None else None


def check_name(name: str) -> str:
    """Return the model name unchanged, or raise ArtifactError: it becomes a folder, a URL segment and a BentoML tag."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise ArtifactError(
            f"model name {name!r}: wanted 1 to 63 lower-case letters, digits, '.', '_' or '-', "
            "with a letter or digit at both ends"
        )
    return name


def visible(name: str) -> str:
    """A column's name or a label as people are shown it: quoted where not all would be seen, as a blank at its end."""
    return name if name and name.isprintable() and name == name.strip() else repr(name)


def listed(names: Iterable[str], limit: int = MAX_LISTED) -> str:
    """Names in one line: the first few, and how many more there are."""
    shown = [visible(name) for name in names]
    more = f" and {len(shown) - limit:,} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def counted(number: int, noun: str) -> str:
    """So many of something, as people read it: 1 row, 1,800 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """A message without line breaks; blanks within a line stay, as they may be a name's own."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def file_digest(path: Path) -> FileDigest:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileDigest(bytes=stream.tell(), sha256=digest.hexdigest())


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it stands in its file, sealed with its own digest."""
    unsealed = manifest.model_copy(update={"sha256": "0" * 64}).model_dump_json(indent=2).encode() + b"\n"
    seal = hashlib.sha256(unsealed).hexdigest()
    head, _, tail = unsealed.rpartition(b"0" * 64)
    return head + seal.encode() + tail


def read_manifest(folder: Path) -> Manifest:
    """Read and check one artifact's manifest; raise ArtifactError on anything but the exact bytes that were written."""
    path = folder / MANIFEST_FILE
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); wanted the artifact's manifest") from error
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"{path}: damaged or from another release, at {where}: {first['msg']}; "
            f"wanted a format {FORMAT} manifest: publish the artifact again"
        ) from error
    head, found, tail = raw.rpartition(manifest.sha256.encode())
    if not found or hashlib.sha256(head + b"0" * 64 + tail).hexdigest() != manifest.sha256:
        raise ArtifactError(f"{path}: altered since it was published (its own SHA-256 does not match)")
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of an artifact against its manifest; return the manifest.

    Raises ArtifactError naming the first file that is missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; the manifest lists it with {wanted.bytes} bytes")
        size = path.stat().st_size
        if size != wanted.bytes:
            raise ArtifactError(f"{path}: {size} bytes found, {wanted.bytes} wanted (truncated or altered)")
        if file_digest(path).sha256 != wanted.sha256:
            raise ArtifactError(f"{path}: altered since it was published (SHA-256 does not match the manifest)")
    return manifest


class NotUtf8(Exception):
    """A file is in another encoding. `str()` says what was found and what is wanted, without the file's name."""

    def __init__(self, found: str) -> None:
        super().__init__(f"not UTF-8 text ({found}); wanted a CSV file saved as UTF-8")


def csv_delimiter(path: Path) -> str:
    """What stands between the values of a CSV file: of the delimiters the one that its first line has most often.

    Raises OSError, NotUtf8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline(_MAX_HEADER)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    if "\0" in header:
        raise not_utf8(path)
    return max(CSV_DELIMITERS, key=header.count)


def not_utf8(path: Path) -> NotUtf8:
    """What is wrong with a file that cannot be decoded: its first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and (line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line):
                return NotUtf8("UTF-16, as it looks")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return NotUtf8(f"byte 0x{line[error.start]:02x} in line {number}")
    return NotUtf8("it has changed meanwhile")


def version_number(text: str) -> int | None:
    """The version that a caller's text is; None where it is none. No int64 has more digits than `_VERSION_DIGITS`."""
    # Python would not read more than 4,300 of them.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _VERSION_DIGITS else None


def drawing(manifest: Manifest, num_samples: int, seed: int) -> tuple[str, dict[str, int]]:
    """The signature that gives so many draws of this seed, and what it takes beside the inputs.

    For an artifact's own defaults `mc_predict`: the answer of `mc_sample`, faster, as their masks are kept.
    """
    if (num_samples, seed) == (manifest.num_samples, manifest.seed):
        return MC_PREDICT, {}
    return MC_SAMPLE, {NUM_SAMPLES: num_samples, SEED: seed}


def drawn_rows(draw_values: int, num_samples: int) -> int:
    """Rows of one call of the draws' signatures at most, of so many values a draw."""
    return max(CALL_DRAWN_VALUES // (draw_values * min(num_samples, QUANTILE_DRAWS)), 1)


def versions(repository: Path, name: str) -> list[int]:
    """The published versions of one model, ascending. Unfinished temporary folders are not versions."""
    folder = repository / name
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isascii() and entry.name.isdigit() and entry.is_dir()
    )


def model_names(repository: Path) -> list[str]:
    """Models with at least one version, sorted."""
    if not repository.is_dir():
        return []
    return sorted(
        entry.name
        for entry in repository.iterdir()
        if entry.is_dir() and NAME_PATTERN.fullmatch(entry.name) and versions(repository, entry.name)
    )
