"""Packaging: a file that Keras saved becomes an artifact, without running any code that came with it.

folder = package(Path("net.keras"), name="net", repository=Path("artifacts"))
"""

from __future__ import annotations

import functools
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np
import tensorflow as tf

from models.artifact import publish
from models.calibration_settings import AS_USUAL, CalibrationSettings, SettingsError
from models.contract import DEFAULT_NUM_SAMPLES, DEFAULT_SEED, ArtifactError, Masks, Precision, Task, check_name
from models.holdout import DAMAGED, Holdout
from models.stochastic import walk

KERAS_SUFFIX = ".keras"
HDF5_SUFFIXES = (".h5", ".hdf5")
# Of the call that shows whether a network takes another number of rows than it says; few have just that one.
_TRIAL_ROWS = 13


class PackageError(ArtifactError):
    """A model file cannot be packaged. One line: the file, what was found, what is wanted."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"{path}: {found}")


def package(
    path: Path,
    *,
    name: str,
    repository: Path,
    calibration: Path | None = None,
    task: Task | None = None,
    labels: list[str] | None = None,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seed: int = DEFAULT_SEED,
    masks: Masks = "independent",
    precision: Precision = "float32",
    calibration_settings: CalibrationSettings = AS_USUAL,
) -> Path:
    """Publish the model saved at `path` (.keras or .h5) as the next version of `name`; return its folder.

    calibration: an .npz file of held-out rows, see `models.holdout`; the draws are calibrated on them.
    Raises ArtifactError (one line) where the file, its layers, the labels or the rows cannot be honoured; the
    repository is then unchanged.
    """
    check_name(name)
    if calibration is None and (asked := calibration_settings.asked):
        raise SettingsError(f"{asked[0]}: found without rows to learn from; wanted --calibration DATA.npz")
    for label in labels or []:
        _check_label(label)
    holdout = Holdout.read(calibration) if calibration is not None else None
    try:
        with warnings.catch_warnings():
            # Keras warns of what matters to training only (an optimizer's state), or is refused here with its reason.
            warnings.simplefilter("ignore")
            return publish(
                load(path),
                name=name,
                repository=repository,
                task=task,
                labels=labels,
                holdout=holdout,
                description=f"packaged from {_shown(path.name)}",
                num_samples=num_samples,
                seed=seed,
                masks=masks,
                precision=precision,
                calibration_settings=calibration_settings,
            )
    except ArtifactError:
        raise
    except Exception as error:
        # The network is a stranger's: whatever it raises while it is traced is a fact about that file.
        raise PackageError(path, f"the network cannot be run as a graph ({_reason(error)})") from error


def _check_label(label: str) -> None:
    try:
        label.encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(f"labels: found {_shown(label)}, which is not UTF-8; wanted text") from error


def _shown(name: str) -> str:
    """A name of the command line, of which bytes that are no UTF-8 stay readable."""
    return os.fsencode(name).decode(errors="backslashreplace")


def load(path: Path) -> keras.Model:
    """The Keras model saved at `path`. Its configuration is read before Keras sees it; no foreign code is run."""
    config = _configuration(path)
    _refuse_foreign_code(path, config.architecture)
    try:
        model = _loaded(path, config.loss)
    except Exception as error:
        raise PackageError(path, f"Keras {keras.__version__} cannot load it ({_reason(error)})") from error
    if not isinstance(model, keras.Model):
        raise PackageError(path, f"holds a {type(model).__name__}; wanted a whole model")
    _refuse_no_numbers(path, model)
    _refuse_noise_shapes(path, model)
    return _with_free_rows(model)


def _refuse_no_numbers(path: Path, model: keras.Model) -> None:
    for weight in model.weights:
        values = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))
        if np.isnan(values).any():
            raise PackageError(path, f"weight {weight.path!r} holds NaN: training diverged; wanted numbers")


def _refuse_noise_shapes(path: Path, model: keras.Model) -> None:
    """Keras builds such a layer and fails, or answers in another shape, once it drops."""
    for name, layer in walk(model):
        noise = getattr(layer, "noise_shape", None)
        if noise is None:
            continue
        # None of a layer that is called outside of a graph, as in a subclassed model.
        for node in layer._inbound_nodes:
            found = node.input_tensors[0].shape
            # A shorter one is broadcast.
            own = noise[1:] if len(noise) >= len(found) else noise
            pairs = zip(reversed(own), reversed(found[1:]), strict=False)
            is_other = any(wanted not in (None, 1) and size not in (None, wanted) for wanted, size in pairs)
            if len(noise) > len(found) or is_other:
                raise PackageError(
                    path,
                    f"layer {name!r}: noise_shape {tuple(noise)} found for a tensor of shape {tuple(found)}; wanted at "
                    "most as many axes, each None, 1 or the tensor's own size",
                )


class _Configuration(NamedTuple):
    architecture: Any
    # As Keras serialises it; None where the model was not compiled.
    loss: Any


def _configuration(path: Path) -> _Configuration:
    """What the file says of itself. Raises PackageError where it is no intact file of its kind."""
    if path.is_dir():
        raise PackageError(path, "is a folder; wanted a file that Keras saved: model.save('model.keras')")
    if not path.is_file():
        raise PackageError(path, "not found; wanted a file that Keras saved, ending in .keras or .h5")
    suffix = path.suffix.lower()
    try:
        if suffix == KERAS_SUFFIX:
            return _keras_configuration(path)
        if suffix in HDF5_SUFFIXES:
            return _hdf5_configuration(path)
    except DAMAGED as error:
        raise PackageError(
            path, f"not an intact Keras file ({_reason(error)}); wanted what model.save() wrote"
        ) from error
    ending = f"ends in {suffix}" if suffix else "has no ending"
    raise PackageError(path, f"{ending}; wanted a file that Keras saved, .keras or .h5")


def _keras_configuration(path: Path) -> _Configuration:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} inside it is damaged")
        document = json.loads(archive.read("config.json"))
    compiled = document.pop("compile_config", None) or {}
    return _Configuration(document, compiled.get("loss"))


def _hdf5_configuration(path: Path) -> _Configuration:
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            raise ValueError("it has no model_config: weights alone are no model")
        document = json.loads(file.attrs["model_config"])
        compiled = json.loads(file.attrs.get("training_config") or "null") or {}
    return _Configuration(document, compiled.get("loss"))


def _loaded(path: Path, loss: Any) -> keras.Model:
    try:
        return keras.models.load_model(path, compile=True, safe_mode=True)
    except (TypeError, ValueError):
        # A loss or a metric of the user's own: of those only Keras's own losses matter here.
        model = keras.models.load_model(path, compile=False, safe_mode=True)
        _compile_with_known_loss(model, loss)
        return model


def _with_free_rows(model: keras.Model) -> keras.Model:
    """The same layers behind inputs that take any number of rows, where the model's take a fixed one.

    A Sequential without an Input has as many rows as its first call had. Where a layer holds on to the number (a state
    for each row, a reshape) the model stays as it is.
    """
    given = getattr(model, "inputs", None) or []
    is_fixed = any(symbol.shape and symbol.shape[0] is not None for symbol in given)
    if not is_fixed or any(getattr(layer, "stateful", False) for _, layer in walk(model)):
        return model
    try:
        free = _freed(model)
        specs = [tf.TensorSpec([_TRIAL_ROWS, *symbol.shape[1:]], symbol.dtype) for symbol in given]
        packed = specs if isinstance(free, keras.Sequential) else [keras.tree.pack_sequence_as(free.input, specs)]
        tf.function(free, autograph=False).get_concrete_function(*packed)
    except (TypeError, ValueError):
        return model
    if model.compiled:
        free.compile(optimizer=model.optimizer, loss=model.loss)
    return free


def _freed(layer: Any) -> Any:
    """A model, with those nested in it, behind inputs of any number of rows; another layer as it is."""
    is_graph = type(layer) in (keras.Sequential, keras.src.models.functional.Functional)
    if not is_graph or not layer.built:
        return layer
    inputs = [keras.Input(symbol.shape[1:], dtype=symbol.dtype, name=symbol.name) for symbol in layer.inputs]
    if type(layer) is keras.Sequential:
        return keras.Sequential([*inputs, *map(_freed, layer.layers)], name=layer.name)
    return keras.models.clone_model(
        layer,
        input_tensors=keras.tree.pack_sequence_as(layer.input, inputs),
        # Once for each, however often it is called.
        clone_function=functools.cache(_freed),
    )


def _compile_with_known_loss(model: keras.Model, loss: Any) -> None:
    """Restore Keras's own losses, each output's: from them follows whether the outputs are logits."""
    if isinstance(loss, list):
        found: Any = [_known_loss(part) for part in loss]
    elif isinstance(loss, dict) and "class_name" not in loss:
        found = {name: _known_loss(part) for name, part in loss.items()}
    else:
        found = _known_loss(loss)
    if found is not None:
        model.compile(loss=found)


def _known_loss(loss: Any) -> Any | None:
    """One loss as Keras serialises it; None where it is none of Keras's own."""
    try:
        return keras.losses.get(loss)
    except (TypeError, ValueError, KeyError):
        return None


# Where Keras's own classes are looked up by a bare name: HDF5 files do not say the module.
_KERAS_MODULES = (keras, keras.layers, keras.models, keras.initializers, keras.regularizers, keras.constraints)
# Classes that Keras writes but does not export by that name.
_KERAS_CLASSES = frozenset({"Functional", "Policy", "DTypePolicy"})
# Where the classes of keras.ops are: Keras writes them into HDF5 files, and finds them there no more.
_OPERATIONS = tuple(getattr(keras.src.ops, name) for name in ("core", "image", "linalg", "math", "nn", "numpy"))


class _Serialised(NamedTuple):
    """One object of a configuration."""

    # The nearest enclosing name.
    layer: str
    class_name: str
    registered_name: str
    module: str | None

    @property
    def is_lambda(self) -> bool:
        return self.class_name in ("Lambda", "__lambda__")

    @property
    def is_operation(self) -> bool:
        return self.module is None and any(hasattr(module, self.class_name) for module in _OPERATIONS)

    @property
    def is_known(self) -> bool:
        if self.module is not None and self.module.partition(".")[0] in ("keras", "builtins"):
            return True
        if keras.saving.get_registered_object(self.registered_name) is not None:
            return True
        bare = self.module is None and self.registered_name == self.class_name
        if not bare:
            return False
        # Tensors, tuples and the like are "__tensor__" ...
        return (
            self.class_name.startswith("__")
            or self.class_name in _KERAS_CLASSES
            or any(hasattr(module, self.class_name) for module in _KERAS_MODULES)
        )


def _refuse_foreign_code(path: Path, architecture: Any) -> None:
    for item in _objects(architecture, "the model"):
        if item.is_lambda:
            raise PackageError(
                path,
                f"layer {item.layer!r} is a Lambda: its function is code inside the file, which is never run; "
                "use a Keras layer, or keras.ops in a functional model",
            )
        if not item.is_known and item.is_operation:
            raise PackageError(
                path,
                f"layer {item.layer!r} is an operation of keras.ops, {item.class_name}, which Keras loads from no HDF5 "
                "file; save the model as .keras",
            )
        if not item.is_known:
            raise PackageError(
                path,
                f"layer {item.layer!r} is of the class {item.registered_name}, which is neither Keras's own nor "
                "registered, and its code is not run from a file; build the network of Keras's layers, or publish it "
                "from Python where keras.saving.register_keras_serializable() decorates the class",
            )


def _objects(node: Any, layer: str) -> Iterator[_Serialised]:
    """Every serialised object below `node`, outer ones first."""
    if isinstance(node, list):
        for item in node:
            yield from _objects(item, layer)
    elif isinstance(node, dict):
        name, config = node.get("class_name"), node.get("config")
        if isinstance(name, str) and "config" in node:
            if isinstance(config, dict) and isinstance(config.get("name"), str):
                layer = config["name"]
            yield _Serialised(layer, name, node.get("registered_name") or name, node.get("module"))
        for value in node.values():
            yield from _objects(value, layer)


def _reason(error: Exception) -> str:
    """The error's own words on one line, without Keras's dumps of whole configurations."""
    text = " ".join(str(error).split())
    text = text.rpartition("Exception encountered: ")[2].partition(" Full object config:")[0]
    return text[:300] or type(error).__name__
