"""Publishing: a trained Keras model becomes one folder of the repository that runs without this project.

folder = publish(model, name="sonar", repository=Path("artifacts"), labels=["mine", "rock"])
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import keyword
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models import warmup
from models.calibration import calibrate
from models.calibration_settings import AS_USUAL, CalibrationSettings
from models.contract import (
    DEFAULT_NUM_SAMPLES,
    DEFAULT_SEED,
    HDF5_FILE,
    KERAS_FILE,
    MANIFEST_FILE,
    MAX_SAMPLES,
    MC_ADAPTIVE,
    MC_DRAWS,
    MC_PREDICT,
    MC_PREDICT_ROWS,
    MC_SAMPLE,
    MIN_NUM_SAMPLES,
    NUM_SAMPLES,
    REPORT_FILE,
    RESERVED_INPUT_NAMES,
    SEED,
    SERVING_DEFAULT,
    TABLE_INPUT,
    TOLERANCE,
    ArtifactError,
    Feature,
    Manifest,
    Masks,
    ModelInput,
    Precision,
    Signature,
    SignatureTensor,
    Task,
    TrainingData,
    check_name,
    file_digest,
    manifest_bytes,
    versions,
)
from models.engine import Engine, Form
from models.holdout import Holdout, KnownRows
from models.network import Network, names_scope
from models.stochastic import walk

# Rows of the examples that go into the manifest and the warm-up records.
_MAX_EXAMPLES = 3
# Differences of a row's draws that are no more than sums in another order, in float32 and in half precision.
_ROUNDING, _ROUNDING_HALF = 1e-3, 5e-2
# Of the trial that shows whether draws are probabilities.
_TRIAL_ROWS, _TRIAL_DRAWS = 16, 8
# Types that requests can carry.
_INPUT_TYPES = (
    *("bool", "string", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")),
)


def publish(
    model: keras.Model,
    *,
    name: str,
    repository: Path,
    task: Task | None = None,
    labels: list[str] | None = None,
    features: list[Feature] | None = None,
    unit: str | None = None,
    has_noise: bool = False,
    examples: list[Any] | None = None,
    holdout: Holdout | KnownRows | None = None,
    calibration_settings: CalibrationSettings = AS_USUAL,
    training_inputs: Mapping[str, np.ndarray] | None = None,
    metrics: Mapping[str, dict[str, float]] | None = None,
    training_data: TrainingData | None = None,
    training: Mapping[str, Any] | None = None,
    description: str = "",
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seed: int = DEFAULT_SEED,
    masks: Masks = "independent",
    precision: Precision = "float32",
    members: int = 1,
    report: Callable[[Path, Manifest], str] | None = None,
) -> Path:
    """Write `repository/name/<next version>/` and return it. A reader never sees half an artifact.

    features: the columns of the model's single input [N, F], or of its inputs [N], one each, in order; the model is
        then a table's.
    has_noise: the model's two columns are a target's mean and the standard deviation of its noise, in its unit.
    examples: rows in the JSON form of `instances`; made up where absent.
    holdout: held-out rows: the draws are calibrated on them; they give figures under "calibration" beside `metrics`,
        and examples where there are none.
    calibration_settings: what is asked of that calibration.
    training_inputs: some of the rows that trained the model, [n, ...] by input name: novelty is the distance from them.
    num_samples, seed: the artifact's defaults.
    masks: "balanced" halves the Monte Carlo variance of the default answer (not of other seeds).
    precision: "bfloat16" computes the draws, not the deterministic answer, in half precision.
    members: of an ensemble, whose model is as `models.members` says: draw t is of member t mod `members`.
    report: makes report.html, from the folder with the finished SavedModel and the manifest, not sealed yet.
    Raises ArtifactError (one line) for a model or a description that cannot be honoured; the repository is unchanged.
    """
    check_name(name)
    if num_samples < MIN_NUM_SAMPLES:
        raise ArtifactError(f"num_samples: {num_samples} found, at least {MIN_NUM_SAMPLES} wanted")
    with _staging(repository, name) as folder:
        _save_keras(model, folder)
        network = Network(_private_copy(model, folder / KERAS_FILE), precision, members)
        inputs = _inputs(network.model, features)
        specs = [tf.TensorSpec([None, *item.shape], item.dtype, name=item.name) for item in inputs]
        engine = Engine(
            network,
            specs,
            task=task,
            labels=labels,
            unit=unit,
            num_samples=num_samples,
            seed=seed,
            masks=masks,
            has_noise=has_noise,
        )
        measured = dict(metrics or {})
        learned = None
        if holdout is not None:
            rows = holdout.matched(inputs, [head.output for head in engine.heads])
            measured["calibration"] = rows.figures(engine.deterministic, specs)
            learned = calibrate(engine, rows, calibration_settings, training_inputs)
            examples = rows.examples(_MAX_EXAMPLES) if examples is None else examples
        if examples is None:
            examples = _made_up_examples(inputs, engine.free_size)
        examples = examples[:_MAX_EXAMPLES]
        signatures = _export(engine, inputs, folder)
        warmup.write(folder, name, _arrays(inputs, examples), num_samples, seed)
        manifest = Manifest(
            name=name,
            version=1,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            description=description,
            inputs=inputs,
            outputs=[head.output for head in engine.heads],
            stochastic_layers=network.stochastic_layers,
            num_samples=num_samples,
            seed=seed,
            masks=masks,
            precision=precision,
            members=members,
            signatures=signatures,
            calibration=learned,
            metrics=measured,
            training_data=training_data,
            training=dict(training or {}),
            examples=examples,
            library_versions=_library_versions(),
            files={},
        )
        if report is not None:
            (folder / REPORT_FILE).write_text(report(folder, manifest), encoding="utf-8")
        return _commit(folder, repository / name, manifest)


@contextlib.contextmanager
def _staging(repository: Path, name: str) -> Iterator[Path]:
    """A temporary sibling of the versions; gone afterwards unless it was renamed."""
    parent = repository / name
    made = [path for path in (parent, repository) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".publishing-", dir=parent))
    except OSError as error:
        raise ArtifactError(
            f"{parent}: cannot be written ({error.strerror}); wanted a folder for the artifact"
        ) from error
    try:
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise ArtifactError(f"{error.filename or folder}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Goes only where it is empty: nothing was published.
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _commit(folder: Path, parent: Path, manifest: Manifest) -> Path:
    files = {
        path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    version = max(versions(parent.parent, parent.name), default=0) + 1
    while True:
        target = parent / str(version)
        sealed = manifest_bytes(manifest.model_copy(update={"version": version, "files": files}))
        (folder / MANIFEST_FILE).write_bytes(sealed)
        for path in folder.rglob("*"):
            if path.is_file():
                _sync(path)
        try:
            os.rename(folder, target)
        except OSError:
            # Somebody else published this number in the meantime.
            if not target.exists():
                raise
            version += 1
            continue
        _sync(parent)
        return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_keras(model: keras.Model, folder: Path) -> None:
    if not model.built:
        raise ArtifactError(f"model {model.name!r}: not built, so its input shape is unknown; call it on a batch first")
    try:
        model.save(folder / KERAS_FILE)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ArtifactError(f"model {model.name!r}: Keras cannot save it ({_first_line(error)})") from error
    if _fits_hdf5(model):
        try:
            model.save(folder / HDF5_FILE)
        except (TypeError, ValueError):
            # Keras cannot: a nested augmentation's random numbers, for one.
            (folder / HDF5_FILE).unlink(missing_ok=True)


def _fits_hdf5(model: keras.Model) -> bool:
    """Whether the model is a graph of layers: HDF5 holds no other architecture, nor operations such as `isnan`."""
    if isinstance(model, keras.Sequential):
        return all(_fits_hdf5(layer) for layer in model.layers if isinstance(layer, keras.Model))
    if not isinstance(model, keras.src.models.functional.Functional):
        return False
    return all(
        isinstance(operation, keras.layers.Layer) and (not isinstance(operation, keras.Model) or _fits_hdf5(operation))
        for operation in model.operations
    )


def _private_copy(model: keras.Model, path: Path) -> keras.Model:
    """The model as the artifact's own file gives it back, so that the caller's model is never touched."""
    try:
        # Uncompiled: a loss or a metric of the caller's own need not be registered.
        with names_scope():
            copy = keras.models.load_model(path, compile=False, safe_mode=True)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise ArtifactError(f"{path.name}: does not load again in safe mode ({_first_line(error)})") from error
    if getattr(model, "loss", None) is not None:
        # It says whether the outputs are logits.
        copy.compile(loss=model.loss)
    return copy


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _inputs(model: keras.Model, features: list[Feature] | None) -> list[ModelInput]:
    """The model's inputs in its own flat order."""
    found = _symbolic_inputs(model)
    if features is not None:
        if len(found) == 1 and list(found[0][1]) == [len(features)]:
            return [ModelInput(name=TABLE_INPUT, dtype="float32", shape=[len(features)], features=features)]
        if len(found) != len(features) or any(shape for _, shape, _ in found):
            shapes = ", ".join(f"{name} {shape}" for name, shape, _ in found)
            raise ArtifactError(
                f"inputs {shapes}: {len(features)} features were named; wanted one input of that many columns, or as "
                "many inputs of one value each"
            )
    for name, _, dtype in found:
        if dtype not in _INPUT_TYPES:
            raise ArtifactError(
                f"input {name!r}: no request carries {dtype}; wanted one of {', '.join(_INPUT_TYPES)}, cast inside"
            )
    names = [_carried(name) for name, _, _ in found]
    for (name, _, _), carried in zip(found, names, strict=True):
        if carried in RESERVED_INPUT_NAMES:
            raise ArtifactError(
                f"input {name!r}: the name is an argument of the signatures, {carried!r}; rename the model's input"
            )
        # In a signature's function an argument called "Age" is "age".
        if [other.lower() for other in names].count(carried.lower()) > 1:
            raise ArtifactError(
                f"input {name!r}: as {carried!r} in the signatures it is one of two; rename the model's input"
            )
    columns = [None] * len(found) if features is None else [[feature] for feature in features]
    return [
        ModelInput(name=name, dtype=dtype, shape=list(shape), features=column)
        for name, (_, shape, dtype), column in zip(names, found, columns, strict=True)
    ]


def _carried(name: str) -> str:
    """The input's name as TensorFlow's signatures can carry it: the same, or its ASCII letters and digits."""

    def fits(name: str) -> bool:
        # "self" is an argument of TensorFlow's own.
        is_plain = re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) is not None
        return is_plain and not keyword.iskeyword(name) and name != "self"

    if fits(name):
        return name
    plain = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_")
    return plain if fits(plain) else f"input_{plain}"


def _symbolic_inputs(model: keras.Model) -> list[tuple[str, tuple[int | None, ...], str]]:
    symbols = getattr(model, "inputs", None)
    if symbols:
        structure = getattr(model, "_inputs_struct", None)
        # A dict's keys, unless one of them stands for several inputs.
        if isinstance(structure, dict) and len(structure) == len(symbols):
            names = sorted(structure)
        else:
            names = [symbol.name for symbol in symbols]
        for symbol in symbols:
            if not symbol.shape or symbol.shape[0] is not None:
                raise ArtifactError(
                    f"input {symbol.name!r}: its batch size is fixed (shape {tuple(symbol.shape)}); "
                    "wanted a free first axis"
                )
            if getattr(symbol, "sparse", False):
                raise ArtifactError(f"input {symbol.name!r}: sparse tensors have no JSON form; wanted a dense input")
        return [(name, tuple(symbol.shape[1:]), str(symbol.dtype)) for name, symbol in zip(names, symbols, strict=True)]
    shape = (model.get_build_config() or {}).get("input_shape")
    if not isinstance(shape, Sequence) or any(isinstance(size, Sequence | Mapping) for size in shape):
        raise ArtifactError(
            f"model {model.name!r}: a subclassed model whose input shape is not recorded; wanted one input, "
            "and one call on a batch before saving"
        )
    return [("inputs", tuple(shape[1:]), "float32")]


def _export(engine: Engine, inputs: list[ModelInput], folder: Path) -> dict[str, Signature]:
    """Write the SavedModel; return its signatures' description."""
    names = [item.name for item in inputs]
    tensors = dict(zip(names, engine.input_specs, strict=True))
    draws = {NUM_SAMPLES: tf.TensorSpec([], tf.int32, NUM_SAMPLES), SEED: tf.TensorSpec([], tf.int64, SEED)}

    def flat(arguments: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        return [arguments[name] for name in names]

    functions = {
        SERVING_DEFAULT: (lambda **kw: engine.deterministic(flat(kw)), tensors),
        MC_PREDICT: (lambda **kw: engine.default(flat(kw)), tensors),
        MC_SAMPLE: (lambda **kw: engine.sample(flat(kw), kw[NUM_SAMPLES], kw[SEED]), {**tensors, **draws}),
        MC_DRAWS: (lambda **kw: engine.draws(flat(kw), kw[NUM_SAMPLES], kw[SEED]), {**tensors, **draws}),
    }
    concrete = {
        name: tf.function(function, autograph=False).get_concrete_function(**specs)
        for name, (function, specs) in functions.items()
    }
    bounds = {
        TOLERANCE: tf.TensorSpec([], tf.float32, TOLERANCE),
        MAX_SAMPLES: tf.TensorSpec([], tf.int32, MAX_SAMPLES),
    }
    # A concrete function: saving would trace anything else a second time.
    adaptive = tf.function(
        lambda **kw: engine.adaptive(flat(kw), kw[TOLERANCE], kw[MAX_SAMPLES], kw[SEED]), autograph=False
    ).get_concrete_function(**tensors, **bounds, **{SEED: draws[SEED]})

    def traced(form: Form) -> Any:
        return tf.function(lambda **kw: form.function(flat(kw)), autograph=False).get_concrete_function(**tensors)

    forms = {MC_PREDICT_ROWS.format(least=form.least, most=form.most): traced(form) for form in engine.forms()}
    for name, function in {**concrete, MC_ADAPTIVE: adaptive, **forms}.items():
        _refuse_state(function, name)
    _refuse_mixed_rows(concrete[MC_DRAWS], engine, names)
    _refuse_broken_probabilities(concrete[MC_DRAWS], engine, names)
    # The variables are attached, not the Keras model: that would export its own signatures and its seed generators.
    module = tf.Module()
    module.weights = [weight.value for weight in engine.network.model.weights]
    module.kept_masks = engine.kept
    module.novelty = engine.novelty.variables if engine.novelty is not None else []
    module.forms = engine.network.own_variables() + ([] if engine.merged is None else engine.merged.variables)
    module.lookup_tables = [
        layer.lookup_table
        for _, layer in walk(engine.network.model)
        if getattr(layer, "lookup_table", None) is not None
    ]
    for name, function in {MC_ADAPTIVE: adaptive, **forms}.items():
        setattr(module, name, function)
    try:
        tf.saved_model.save(module, str(folder), signatures=concrete)
    except tf.errors.OpError as error:
        # TensorFlow's own form of a full disk, for one.
        reason = error.message.rpartition("; ")[2]
        raise ArtifactError(f"{folder}: cannot be written ({reason})") from error
    return {name: _signature(function) for name, function in concrete.items()}


def _signature(function: Any) -> Signature:
    _, arguments = function.structured_input_signature
    inputs = [_signature_tensor(name, spec) for name, spec in arguments.items()]
    outputs = [_signature_tensor(name, spec) for name, spec in sorted(function.structured_outputs.items())]
    return Signature(inputs=inputs, outputs=outputs)


def _signature_tensor(name: str, spec: tf.TensorSpec) -> SignatureTensor:
    return SignatureTensor(name=name, dtype=spec.dtype.name, shape=spec.shape.as_list())


def _refuse_state(function: Any, signature: str) -> None:
    """No random generator with a state of its own and no assignment may be left in the graph."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *[node for body in graph.library.function for node in body.node_def]]
    for node in nodes:
        # Stateless generators have seeds as inputs.
        random = node.op in _STATEFUL_RANDOM or (node.op.startswith("Random") and "seed" in node.attr)
        if random or node.op.startswith("Assign"):
            raise ArtifactError(
                f"signature {signature}: operation {node.op} ({node.name}) keeps a state between calls; "
                "answers would depend on earlier requests: use Keras's stochastic layers, not random functions"
            )


def _refuse_mixed_rows(draws: Any, engine: Engine, names: Sequence[str]) -> None:
    """A row's draws must not change with its batch mates or with the number of draws.

    They would where an operation works over the rows' axis or merges it with another: a trial shows that.
    """
    rows = dict(zip(names, engine.made_up(2, 1.0), strict=True))
    seed = tf.constant(engine.seed, tf.int64)
    together = draws(**rows, num_samples=tf.constant(3), seed=seed)
    alone = draws(**{name: values[1:] for name, values in rows.items()}, num_samples=tf.constant(2), seed=seed)
    tolerance = _ROUNDING_HALF if engine.network.is_half_precision else _ROUNDING
    for name, found in alone.items():
        expected = together[name].numpy()[1:, :2]
        if not np.allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise ArtifactError(
                f"output {name.removesuffix('draws').removesuffix('_') or 'draws'!r}: a row's draws change with the "
                "other rows or with the number of draws; wanted a network whose operations keep the rows' axis apart "
                "(none over axis 0, no reshape that merges it)"
            )


def _refuse_broken_probabilities(draws: Any, engine: Engine, names: Sequence[str]) -> None:
    """Noise behind a softmax or a sigmoid leaves draws that are no probabilities, and entropies of nothing.

    Large numbers show it: a sigmoid near 1 leaves its range when it is scaled up for what is dropped.
    """
    heads = [head for head in engine.heads if head.is_classification and head.link == "identity"]
    if not heads:
        return
    rows = dict(zip(names, engine.made_up(_TRIAL_ROWS, 10.0), strict=True))
    found = draws(**rows, num_samples=tf.constant(_TRIAL_DRAWS), seed=tf.constant(engine.seed, tf.int64))
    tolerance = _ROUNDING_HALF if engine.network.is_half_precision else _ROUNDING
    for head in heads:
        values = found[head.output.prefix + "draws"].numpy()
        values = values[np.isfinite(values).all(axis=-1)]
        inside = (values >= -tolerance).all() and (values <= 1 + tolerance).all()
        if not (inside and np.allclose(values.sum(axis=-1), 1, atol=tolerance)):
            raise ArtifactError(
                f"output {head.output.name!r}: with dropout on its values are no probabilities (between 0 and 1, with "
                "a sum of 1); wanted noise before the softmax or sigmoid, not behind it, or --task regression"
            )


_STATEFUL_RANDOM = frozenset(
    {"Multinomial", "TruncatedNormal", "RngSkip", "RngReadAndSkip", "StatefulUniform", "StatefulStandardNormalV2"}
)


def _made_up_examples(inputs: list[ModelInput], free: int) -> list[Any]:
    def value(item: ModelInput) -> Any:
        shape = [free if size is None else size for size in item.shape]
        blank: Any = {"string": "", "bool": False}.get(item.dtype, 0.0 if "float" in item.dtype else 0)
        return np.full(shape, blank).tolist() if shape else blank

    if len(inputs) == 1:
        return [value(inputs[0])]
    return [{item.name: value(item) for item in inputs}]


def _arrays(inputs: list[ModelInput], examples: list[Any]) -> dict[str, np.ndarray]:
    """Examples in JSON form as arrays [N, ...] by input name."""
    arrays = {}
    for place, item in enumerate(inputs):
        dtype = object if item.dtype == "string" else tf.as_dtype(item.dtype).as_numpy_dtype
        missing = "" if item.dtype == "string" else np.nan
        rows = [_with_missing(_example_of(item, place, example), missing) for example in examples]
        arrays[item.name] = np.array(rows, dtype=dtype)
    return arrays


def _example_of(item: ModelInput, place: int, example: Any) -> Any:
    """What one example says of one input, the model's input number `place`."""
    if not isinstance(example, dict):
        return example[place] if item.features is not None and not item.shape else example
    if item.features is None or (item.name in example and item.shape):
        return example[item.name]
    columns = [example[feature.name] for feature in item.features]
    return columns if item.shape else columns[0]


def _with_missing(value: Any, missing: Any) -> Any:
    """The value with what stands for a missing one in the place of null."""
    if isinstance(value, list):
        return [_with_missing(entry, missing) for entry in value]
    return missing if value is None else value


def _library_versions() -> dict[str, str]:
    found = {}
    for library in ("dropserve", "tensorflow", "keras", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
