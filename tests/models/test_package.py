"""`dropserve package`: any Keras file in, an artifact out; on bad input exit code 2, one line, nothing changed."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import dropserve
from models.contract import verify
from models.package import package
from tests.models import networks
from tests.models.artifacts import Artifact


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(*stack, units: int = 3, activation: Any = "softmax", **options) -> keras.Model:
    """Four numbers in, the given layers, one dense output."""
    shape = options.pop("input", keras.Input((4,), name="x"))
    return keras.Sequential([shape, *stack, layers.Dense(units, activation=activation, name="answer")], **options)


def plain() -> keras.Model:
    return networks.scatter(table(layers.Dropout(0.5, name="drop")))


def arrays(**changes) -> dict[str, Any]:
    random = np.random.default_rng(0)
    usual = {"x": random.normal(size=(20, 4)).astype(np.float32), "y": random.integers(0, 3, 20)}
    return {name: array for name, array in {**usual, **changes}.items() if array is not None}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with good files: net.keras, net.h5, rows.npz, and a repository that holds one artifact."""
    folder = tmp_path_factory.mktemp("desk")
    model = plain()
    model.compile("adam", "sparse_categorical_crossentropy")
    model.save(folder / "net.keras")
    model.save(folder / "net.h5")
    np.savez(folder / "rows.npz", **arrays())
    return folder


@pytest.fixture
def command(desk, monkeypatch, capfd):
    """Runs `dropserve package`; gives exit code, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.chdir(desk)
        monkeypatch.delenv("DROPSERVE_REPOSITORY", raising=False)
        monkeypatch.setattr(sys, "argv", ["dropserve", "package", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            dropserve.main()
        except SystemExit as stop:
            code = stop.code
        output, error = capfd.readouterr()
        assert code is None or isinstance(code, int)
        return code or 0, output, error

    return run


# What goes through.


@pytest.mark.parametrize("file", ["net.keras", "net.h5"])
def test_a_saved_model_becomes_an_artifact(command, desk, file):
    code, output, error = command(file, "--name", f"good-{file}", "--labels", "a, b,c", "--calibration", "rows.npz")
    assert (code, error) == (0, "")
    folder = desk / "artifacts" / f"good-{file}" / "1"
    assert "artifacts" in output
    assert "accuracy" in output
    manifest = verify(folder)
    assert manifest.outputs[0].labels == ["a", "b", "c"]
    assert [layer.path for layer in manifest.stochastic_layers] == ["drop"]
    rows = arrays()
    assert manifest.examples == [[float(str(value)) for value in row] for row in rows["x"][:3]]
    probabilities = keras.models.load_model(desk / file, compile=False).predict(rows["x"], verbose=0).astype(np.float64)
    artifact = Artifact(folder)
    found = artifact.answer("serving_default", rows["x"])["probabilities"]
    np.testing.assert_allclose(found, probabilities, atol=1e-6)
    figures = manifest.metrics["calibration"]
    assert figures["accuracy"] == np.mean(probabilities.argmax(axis=1) == rows["y"])
    assert figures["nll"] == pytest.approx(-np.log(probabilities[np.arange(20), rows["y"]]).mean(), abs=1e-6)
    one_hot = np.eye(3)[rows["y"]]
    assert figures["brier"] == pytest.approx(((probabilities - one_hot) ** 2).sum(axis=1).mean(), abs=1e-6)


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_a_file_whose_name_is_not_utf8_is_taken(command, desk, tmp_path, ending):
    path = tmp_path / f"net\udcff{ending}"
    path.write_bytes((desk / f"net{ending}").read_bytes())
    code, _, error = command(path, "--name", f"latin{ending}")
    assert (code, error) == (0, "")
    assert verify(desk / "artifacts" / f"latin{ending}" / "1").description == f"packaged from net\\xff{ending}"


def test_defaults_and_json(command, desk):
    code, output, error = command("net.keras", "--name", "json", "--num-samples", 7, "--seed", -5, "--json")
    assert (code, error) == (0, "")
    document = json.loads(output)
    manifest = verify(desk / document["folder"])
    assert (document["name"], document["version"], document["bento_tag"]) == ("json", 1, "json:1")
    assert (manifest.num_samples, manifest.seed) == (7, -5)
    assert verify(Path(os.environ["BENTOML_HOME"], "models", "json", "1")) == manifest


def test_as_a_real_process(desk, tmp_path):
    root = Path(dropserve.__file__).parent
    command = [sys.executable, str(root / "dropserve.py"), "package", "--name", "real", "--repository", str(tmp_path)]
    good = subprocess.run([*command, str(desk / "net.h5")], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    verify(tmp_path / "real" / "1")
    bad = subprocess.run([*command, str(desk / "none.h5")], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "none.h5: not found" in bad.stderr


def artifact_of(model: keras.Model, desk: Path, command, name: str, *arguments) -> Artifact:
    model.save(desk / f"{name}.keras")
    code, _, error = command(f"{name}.keras", "--name", name, *arguments)
    assert (code, error) == (0, ""), error
    return Artifact(desk / "artifacts" / name / "1")


def test_a_quantized_layer_of_one_unit_keeps_its_scale(command, desk):
    """Its kernel holds whole numbers, which mean nothing without their scale."""
    model = keras.Sequential([keras.Input((4,), name="x"), layers.Dense(8), layers.Dropout(1e-6), layers.Dense(1)])
    for layer in networks.scatter(model).layers:
        if isinstance(layer, layers.Dense):
            layer.quantize("int8")
    artifact = artifact_of(model, desk, command, "int8")
    x = arrays()["x"]
    certain = artifact.answer("serving_default", x)["mean"]
    # Next to nothing is dropped; what is left is a step of the activations' rounding.
    np.testing.assert_allclose(artifact.draws(x, 3), np.tile(certain[:, None], 3), atol=0.02)


def test_a_sequential_network_without_an_input_takes_more_rows_than_its_first_call(command, desk):
    x = arrays()["x"]
    model = keras.Sequential([layers.Dense(8, "relu"), layers.Dropout(0.3), layers.Dense(1)])
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    model(x[:1])
    assert model.inputs[0].shape[0] == 1
    artifact = artifact_of(model, desk, command, "called")
    certain = artifact.answer("serving_default", x)["probabilities"]
    np.testing.assert_allclose(certain[:, 1], 1 / (1 + np.exp(-model(x)[:, 0])), atol=1e-6)
    assert artifact.draws(x, 3).shape[:2] == (len(x), 3)
    # What is published for further training takes them too.
    saved = keras.models.load_model(desk / "artifacts" / "called" / "1" / "model.keras")
    np.testing.assert_array_equal(saved(x), model(x))


def test_a_network_of_a_fixed_number_of_rows_takes_any(command, desk):
    one, other = (
        keras.Input((3,), batch_size=2, name="one"),
        keras.Input((4,), batch_size=2, name="other", dtype="int32"),
    )
    x = layers.Concatenate()([layers.Dense(4, "relu")(one), layers.Flatten()(layers.Embedding(5, 2)(other))])
    inside = keras.Input((12,), batch_size=2)
    nested = keras.Model(inside, layers.Dropout(0.3)(inside))
    outputs = {"p": layers.Dense(2, "softmax", name="p")(nested(x)), "q": layers.Dense(1, name="q")(nested(x))}
    model = keras.Model({"one": one, "other": other}, outputs)
    model.compile(loss={"p": "sparse_categorical_crossentropy", "q": "mse"})
    artifact = artifact_of(model, desk, command, "fixed")
    rng = np.random.default_rng(0)
    inputs = {"one": rng.normal(size=(6, 3)).astype(np.float32), "other": rng.integers(0, 5, (6, 4)).astype(np.int32)}
    wanted = [model({name: x[start : start + 2] for name, x in inputs.items()}) for start in (0, 2, 4)]
    answer = artifact.answer("serving_default", inputs)
    np.testing.assert_allclose(answer["p_probabilities"], np.concatenate([row["p"] for row in wanted]), atol=1e-6)
    np.testing.assert_allclose(answer["q_mean"], np.concatenate([row["q"] for row in wanted])[:, 0], atol=1e-6)
    assert artifact.sample(inputs, 50)["p_mutual_information"].min() > 0
    saved = keras.models.load_model(desk / "artifacts" / "fixed" / "1" / "model.keras")
    np.testing.assert_allclose(saved(inputs)["p"], answer["p_probabilities"], atol=1e-6)


def test_what_keras_cannot_save_as_hdf5_is_published_without_that_file(command, desk):
    """A nested augmentation, say: it would copy a layer's random numbers, and cannot."""
    inputs = keras.Input((4, 4, 1), name="image")
    augmented = keras.Sequential([keras.Input((4, 4, 1)), layers.RandomFlip(), layers.RandomBrightness(0.1)])(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Dropout(0.5)(layers.Flatten()(augmented))))
    with pytest.raises(TypeError, match="cannot pickle"):
        model.save(desk / "augmented.h5")
    artifact = artifact_of(model, desk, command, "augmented")
    assert "model.keras" in artifact.manifest.files
    assert "model.h5" not in artifact.manifest.files


def test_a_dict_of_inputs_of_which_one_holds_several(command, desk):
    one, two, three = (keras.Input((3,), name=name) for name in ("one", "two", "three"))
    x = layers.Dropout(0.3)(layers.Concatenate()([one, two, three]))
    artifact = artifact_of(keras.Model({"one": one, "rest": [two, three]}, layers.Dense(1)(x)), desk, command, "deep")
    assert [item.name for item in artifact.manifest.inputs] == ["one", "two", "three"]


def test_made_up_examples_are_of_their_inputs_types(command, desk):
    """What the server warms up with, and refuses to serve a model that does not take it."""
    given = [keras.Input((1,), name=name, dtype=name) for name in ("bool", "int64", "float32")]
    x = layers.Concatenate()([keras.ops.cast(value, "float32") for value in given])
    artifact = artifact_of(keras.Model(given, layers.Dense(1)(layers.Dropout(0.3)(x))), desk, command, "types")
    (example,) = artifact.manifest.examples
    assert example == {"bool": [False], "int64": [0], "float32": [0.0]}
    assert {name: type(values[0]) for name, values in example.items()} == {"bool": bool, "int64": int, "float32": float}


@pytest.mark.parametrize(
    ("shape", "pooled", "size"),
    [
        ((None, 1), [layers.Conv1D(4, 80, strides=4), layers.GlobalAveragePooling1D()], 128),
        ((None, None, 2), [*[layers.MaxPooling2D() for _ in range(5)], layers.GlobalAveragePooling2D()], 32),
    ],
)
def test_free_axes_are_tried_at_a_size_that_the_network_takes(command, desk, shape, pooled, size):
    model = table(*pooled, layers.Dropout(0.5), input=keras.Input(shape, name="x"))
    artifact = artifact_of(model, desk, command, f"free-{size}")
    assert np.shape(artifact.manifest.examples[0]) == tuple(size if axis is None else axis for axis in shape)


@keras.saving.register_keras_serializable(package="written")
class Reader(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.embed, self.drop, self.answer = layers.Embedding(3, 4), layers.Dropout(0.5), layers.Dense(1)

    def call(self, inputs, training=False):
        return self.answer(keras.ops.mean(self.drop(self.embed(inputs), training=training), axis=1))


def test_tokens_that_come_as_floats_are_tried_as_tokens(command, desk):
    """Keras's inputs are floats where nobody said int; an Embedding has no vector for -0.7 or 12.3."""
    subclassed = Reader()
    subclassed(np.zeros((1, 5), np.int32))
    stack = [layers.Embedding(3, 4), layers.Dropout(0.5), layers.Flatten()]
    rows = np.array([[0, 1, 2, 2, 1]], np.float32)
    for number, model in enumerate([table(*stack, input=keras.Input((5,), name="x")), subclassed]):
        artifact = artifact_of(networks.scatter(model), desk, command, f"tokens-{number}")
        name = artifact.manifest.inputs[0].name
        draws = artifact.answer("mc_draws", {name: rows}, num_samples=5, seed=0)["draws"]
        assert np.ptp(draws, axis=1).max() > 1e-3


def test_names_that_no_signature_can_carry_are_made_plain(command, desk):
    names = ["petal-width", "1st", "class", "Sepal length (cm)", "own_name"]
    given = [keras.Input((1,), name=name) for name in names]
    model = keras.Model(given, layers.Dense(1)(layers.Dropout(0.3)(layers.Concatenate()(given))))
    artifact = artifact_of(networks.scatter(model), desk, command, "plain-names")
    plain = ["petal_width", "input_1st", "input_class", "Sepal_length_cm", "own_name"]
    assert [item.name for item in artifact.manifest.inputs] == plain
    values = [np.full((2, 1), number, np.float32) for number in range(5)]
    found = artifact.answer("serving_default", dict(zip(plain, values, strict=True)))["mean"]
    np.testing.assert_array_equal(found, keras.ops.convert_to_numpy(model(values))[:, 0])


def test_logits_are_told_from_probabilities_by_the_loss(command, desk):
    model = networks.scatter(table(layers.Dropout(0.5), activation=None))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = arrays()["x"]
    found = artifact_of(model, desk, command, "logits").answer("serving_default", x)["probabilities"]
    logits = model.predict(x, verbose=0)
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("activation", ["hard_sigmoid", "sparse_sigmoid"])
def test_probabilities_of_a_rarer_sigmoid_are_not_squashed_again(command, desk, activation):
    model = networks.scatter(table(layers.Dropout(0.5), units=1, activation=activation))
    x = arrays()["x"]
    artifact = artifact_of(model, desk, command, activation, "--labels", "a,b")
    found = artifact.answer("serving_default", x)["probabilities"]
    np.testing.assert_array_equal(found[:, 1:], keras.ops.convert_to_numpy(model(x)))
    # Without labels, too, they are seen for what they are.
    assert artifact_of(model, desk, command, activation).manifest.outputs[0].task == "classification"


def test_a_loss_and_a_metric_of_ones_own_do_not_stand_in_the_way(command, desk):
    def own(truth, answer):
        return keras.ops.mean(truth - answer)

    model = table(layers.Dropout(0.5), units=1, activation=None)
    model.compile("sgd", loss=own, metrics=[own])
    assert artifact_of(model, desk, command, "own-loss").manifest.outputs[0].task == "regression"
    model = table(layers.Dropout(0.5), activation=None)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[own])
    assert artifact_of(model, desk, command, "own-metric").manifest.outputs[0].task == "classification"


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("by_name", [True, False])
def test_each_outputs_loss_counts_where_keras_cannot_compile_the_file(command, desk, suffix, by_name):
    def own(truth, answer):
        return keras.ops.mean(truth - answer)

    x = inputs = keras.Input((4,), name="x")
    x = layers.Dropout(0.5)(x)
    heads = {"kind": layers.Dense(3, name="kind")(x), "size": layers.Dense(1, name="size")(x)}
    heads["sold"] = layers.Dense(1, name="sold")(x)
    losses = {
        "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "size": "mse",
        "sold": keras.losses.BinaryCrossentropy(from_logits=True),
    }
    model = keras.Model(inputs, list(heads.values()))
    model.compile("sgd", losses if by_name else list(losses.values()), metrics={"size": own})
    model.save(desk / f"losses{suffix}")
    code, output, error = command(f"losses{suffix}", "--name", "losses", "--json")
    assert (code, error) == (0, "")
    tasks = {output["name"]: output["task"] for output in json.loads(output)["outputs"]}
    assert tasks == {"kind": "classification", "size": "regression", "sold": "classification"}


@pytest.fixture(scope="module")
def usual(desk, tmp_path_factory) -> dict[str, dict[str, float]]:
    """The figures of the rows with class numbers."""
    repository = tmp_path_factory.mktemp("usual")
    folder = package(desk / "net.keras", name="usual", repository=repository, calibration=desk / "rows.npz")
    return verify(folder).metrics


@pytest.mark.parametrize(
    "change",
    [
        {"y": np.eye(3)[arrays()["y"]]},
        {"y": arrays()["y"][:, None].astype(np.float32)},
        {"y": np.array(["a", "b", "ç"])[arrays()["y"]]},
        {"y": np.char.encode(["a", "b", "ç"], "utf-8")[arrays()["y"]]},
        {"x": arrays()["x"].astype(np.float64)},
    ],
    ids=["one-hot", "column of floats", "labels", "labels in bytes", "float64"],
)
def test_targets_in_the_forms_that_keras_users_have(command, desk, usual, change):
    np.savez(desk / "forms.npz", **arrays(**change))
    code, output, error = command(
        *("net.keras", "--name", "forms", "--labels", "a,b,ç", "--calibration", "forms.npz", "--json")
    )
    assert (code, error) == (0, "")
    assert json.loads(output)["metrics"] == usual


def test_several_inputs_and_outputs(command, desk):
    left, word = keras.Input((3,), name="left"), keras.Input((), name="word", dtype="string")
    looked_up = layers.StringLookup(vocabulary=["red", "green"], output_mode="one_hot")(word)
    x = layers.Dropout(0.4)(layers.Concatenate()([left, looked_up]))
    model = keras.Model(
        {"left": left, "word": word},
        {"kind": layers.Dense(2, activation="softmax")(x), "size": layers.Dense(1)(x)},
    )
    rows: dict[str, Any] = {
        "left": np.arange(12, dtype=np.float32).reshape(4, 3),
        "word": np.array(["red", "green", "blue", "red"]),
        "y_kind": np.array([0, 1, 0, 1]),
        "y_size": np.array([0.5, 1.0, 2.0, 3.0]),
    }
    np.savez(desk / "several.npz", **rows)
    artifact = artifact_of(model, desk, command, "several", "--labels", "a,b", "--calibration", "several.npz")
    manifest = artifact.manifest
    assert [(output.name, output.task, output.labels) for output in manifest.outputs] == [
        ("kind", "classification", ["a", "b"]),
        ("size", "regression", None),
    ]
    assert manifest.examples[1] == {"left": [3.0, 4.0, 5.0], "word": "green"}
    given = {"left": rows["left"], "word": rows["word"]}
    answer = artifact.answer("serving_default", given)
    figures = manifest.metrics["calibration"]
    assert figures["kind_accuracy"] == np.mean(answer["kind_probabilities"].argmax(axis=1) == rows["y_kind"])
    error = answer["size_mean"].astype(np.float64) - rows["y_size"]
    assert figures["size_rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert figures["size_mae"] == pytest.approx(np.abs(error).mean())


def test_an_input_called_y_is_not_taken_for_the_answers(command, desk):
    given = [keras.Input((2,), name="a"), keras.Input((1,), name="y")]
    model = keras.Model(given, layers.Dense(1, name="out")(layers.Dropout(0.4)(layers.Concatenate()(given))))
    random = np.random.default_rng(0)
    rows: dict[str, Any] = {"a": random.normal(size=(30, 2)), "y": random.normal(size=(30, 1))}
    networks.scatter(model).save(desk / "y.keras")
    np.savez(desk / "y.npz", **rows)
    options = ("y.keras", "--name", "called-y", "--calibration", "y.npz")
    refused(command, desk, *options, reason="y.npz: holds the arrays 'a', 'y'; 'a', 'y', 'y_out' wanted")
    truth = random.normal(size=30)
    np.savez(desk / "y.npz", **rows, y_out=truth)
    artifact = artifact_of(model, desk, command, "called-y", "--calibration", "y.npz")
    error = artifact.answer("serving_default", rows)["mean"].astype(np.float64) - truth
    assert artifact.manifest.metrics["calibration"]["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))


def test_outputs_whose_answers_would_have_one_name_are_refused(command, desk):
    """`size_epistemic_std`: how uncertain the size is, and how far the answers of `size_epistemic` spread."""
    x = inputs = keras.Input((4,), name="x")
    x = layers.Dropout(0.5)(x)
    model = keras.Model(inputs, [layers.Dense(1, name=name)(x) for name in ("size", "size_epistemic")])
    # While the noise is not known there is no `std`.
    artifact = artifact_of(networks.scatter(model), desk, command, "alike")
    assert len(artifact.manifest.outputs) == 2
    random = np.random.default_rng(0)
    rows: dict[str, Any] = {"x": random.normal(size=(30, 4))}
    rows |= {"y_size": random.normal(size=30), "y_size_epistemic": random.normal(size=30)}
    np.savez(desk / "alike.npz", **rows)
    options = ("alike.keras", "--name", "alike", "--calibration", "alike.npz")
    refused(command, desk, *options, reason="'size_epistemic_std' in the signatures would be an answer of two")


# What is refused: files.


def no_zip(folder):
    (folder / "bad.keras").write_text("not a model")


def truncated(folder):
    content = (folder / "net.keras").read_bytes()
    (folder / "bad.keras").write_bytes(content[: len(content) // 2])


def flipped(folder):
    content = bytearray((folder / "net.keras").read_bytes())
    position = content.index(b"\x89HDF") + 600
    content[position] ^= 1
    (folder / "bad.keras").write_bytes(content)


def no_configuration(folder):
    with zipfile.ZipFile(folder / "bad.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")


def broken_configuration(folder):
    with zipfile.ZipFile(folder / "bad.keras", "w") as archive:
        archive.writestr("config.json", "{")


def hdf5_called_keras(folder):
    (folder / "bad.keras").write_bytes((folder / "net.h5").read_bytes())


def truncated_hdf5(folder):
    content = (folder / "net.h5").read_bytes()
    (folder / "bad.h5").write_bytes(content[: len(content) // 2])


def keras_called_hdf5(folder):
    (folder / "bad.h5").write_bytes((folder / "net.keras").read_bytes())


def weights_only(folder):
    plain().save_weights(folder / "bad.weights.h5")


def empty(folder):
    (folder / "bad.keras").write_bytes(b"")


def a_folder(folder):
    (folder / "bad").mkdir(exist_ok=True)


def a_text(folder):
    (folder / "bad.txt").write_text("x")


@pytest.mark.parametrize(
    ("make", "file", "reason"),
    [
        (None, "nowhere.keras", "not found"),
        (no_zip, "bad.keras", "not an intact Keras file"),
        (empty, "bad.keras", "not an intact Keras file"),
        (truncated, "bad.keras", "not an intact Keras file"),
        (flipped, "bad.keras", "not an intact Keras file"),
        (no_configuration, "bad.keras", "config.json"),
        (broken_configuration, "bad.keras", "not an intact Keras file"),
        (hdf5_called_keras, "bad.keras", "not an intact Keras file"),
        (truncated_hdf5, "bad.h5", "not an intact Keras file"),
        (keras_called_hdf5, "bad.h5", "not an intact Keras file"),
        (weights_only, "bad.weights.h5", "weights alone are no model"),
        (a_folder, "bad", "is a folder"),
        (a_text, "bad.txt", "ends in .txt"),
    ],
)
def test_what_is_no_keras_file_is_refused(command, desk, make, file, reason):
    if make is not None:
        make(desk)
    refused(command, desk, file, "--name", "bad", reason=f"{file}: .*{reason}")


def refused(command, desk: Path, *arguments, reason: str) -> None:
    """Exit code 2, one line that says why, and neither the repository nor BentoML's store has changed."""
    store = Path(os.environ["BENTOML_HOME"])
    artifacts = desk / "artifacts"
    before = artifacts.exists(), tree(artifacts), tree(store / "models")
    code, output, error = command(*arguments)
    assert code == 2
    assert output == ""
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert re.search(reason, error), error
    assert (artifacts.exists(), tree(artifacts), tree(store / "models")) == before
    assert not artifacts.exists() or not list(artifacts.rglob(".publishing-*"))


# What is refused: networks.


@keras.saving.register_keras_serializable(package="strange")
class Strange(layers.Layer):
    def call(self, inputs):
        return inputs


class StrangeDropout(layers.Dropout):
    def call(self, inputs, training=False):
        return inputs


class StrangeModel(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.drop, self.dense = layers.Dropout(0.5), layers.Dense(1)

    def call(self, inputs, training=False):
        return self.dense(self.drop(inputs, training=training))


def strange_activation(x):
    return x


def subclassed() -> keras.Model:
    model = StrangeModel()
    model(np.zeros((1, 4)))
    return model


def reshaped_batch() -> keras.Model:
    inputs = keras.Input((4,), batch_size=2, name="x")
    pairs = keras.ops.reshape(layers.Dropout(0.5)(inputs), (2, 2, 2))
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(pairs)))


def two_outputs() -> keras.Model:
    x = inputs = keras.Input((4,), name="x")
    certain = layers.Dense(1, name="certain")(x)
    return keras.Model(inputs, [certain, layers.Dense(1, name="unsure")(layers.Dropout(0.5)(x))])


def stateful() -> keras.Model:
    return keras.Sequential(
        [keras.Input((5, 2), batch_size=1), layers.LSTM(2, stateful=True, dropout=0.5, name="memory"), layers.Dense(1)]
    )


def called_with_others() -> keras.Model:
    own = {name: keras.Input((2,), name=name) for name in ("a", "c")}
    pair = keras.Model(own, layers.Dropout(0.5)(layers.Concatenate()([own["a"], own["c"]])), name="pair")
    given = {name: keras.Input((2,), name=name) for name in ("a", "b", "c")}
    return keras.Model(given, layers.Dense(1)(pair(given)))


def with_late(layer: keras.Layer, **options: Any) -> keras.Model:
    """A layer behind the answer."""
    net = table(layers.Dropout(0.5), **options)
    return keras.Model(net.inputs, layer(net.outputs[0]))


def compiled(model: keras.Model, loss: keras.Loss) -> keras.Model:
    model.compile("sgd", loss)
    return model


def diverged(model: keras.Model) -> keras.Model:
    model.layers[-1].kernel.assign(np.full(model.layers[-1].kernel.shape, np.nan))
    return model


def labels_too() -> keras.Model:
    net = table(layers.Dropout(0.5))
    word = layers.StringLookup(vocabulary=["rock"], invert=True, name="word")
    return keras.Model(net.inputs, [net.outputs[0], word(keras.ops.argmax(net.outputs[0], axis=-1))])


def turned() -> keras.Model:
    inputs = keras.Input((5, 4), name="x")
    x = layers.Dropout(0.5, name="late")(keras.ops.transpose(inputs, (1, 0, 2)))
    return keras.Model(inputs, layers.Dense(1)(keras.ops.transpose(x, (1, 0, 2))))


NETWORKS = {
    "strings": (labels_too, "output 'word': its values are of type string"),
    "noise on tensors that have the rows on another axis": (
        turned,
        r"layer 'late': its noise falls on a tensor of shape \(5, None, 4\), where the rows are not the first axis",
    ),
    "noise on whole numbers": (
        lambda: table(layers.Dropout(0.5, name="drop"), input=keras.Input((4,), dtype="int32", name="x")),
        "layer 'drop': its noise falls on numbers of type int32",
    ),
    "dropout at each step of any number of steps": (
        lambda: keras.Sequential(
            [
                keras.Input((None, 4), name="x"),
                layers.TimeDistributed(layers.Dropout(0.5), name="steps"),
                layers.Dense(1),
            ]
        ),
        "layer 'steps': what drops inside it would drop anew at each step of a free number",
    ),
    "a noise_shape of more axes than its tensor": (
        lambda: table(layers.Dropout(0.5, noise_shape=(None, 1, 1, 4), name="drop")),
        r"odd.keras: layer 'drop': noise_shape \(None, 1, 1, 4\) found for a tensor of shape \(None, 4\); wanted",
    ),
    "a shorter noise_shape of another size": (
        lambda: keras.Sequential(
            [keras.Input((5, 4)), layers.Dropout(0.5, noise_shape=(3, 4), name="drop"), layers.Dense(1)]
        ),
        r"layer 'drop': noise_shape \(3, 4\) found for a tensor of shape \(None, 5, 4\); wanted at most",
    ),
    "a noise_shape of another size, in a nested model": (
        lambda: table(keras.Sequential([layers.AlphaDropout(0.5, noise_shape=(None, 3), name="drop")], name="part")),
        r"layer 'part/drop': noise_shape \(None, 3\) found for a tensor of shape \(None, 4\); wanted at most",
    ),
    "Lambda": (
        lambda: table(layers.Dropout(0.5), layers.Lambda(lambda x: x * 2, name="double")),
        "'double' is a Lambda",
    ),
    "nested Lambda": (
        lambda: table(layers.Dropout(0.5), keras.Sequential([layers.Lambda(lambda x: x, name="inner")])),
        "'inner' is a Lambda",
    ),
    "custom layer": (
        lambda: table(layers.Dropout(0.5), Strange(name="odd")),
        "layer 'odd' is of the class strange>Strange",
    ),
    "custom dropout": (lambda: table(StrangeDropout(0.5, name="odd")), "layer 'odd' is of the class .*StrangeDropout"),
    "custom activation": (lambda: table(layers.Dropout(0.5), activation=strange_activation), "strange_activation"),
    "nothing stochastic": (table, "no layer of the network is stochastic"),
    "all rates 0": (lambda: table(layers.Dropout(0.0, name="off")), r"all rates are 0 \(off\)"),
    "rate 1": (lambda: table(layers.Dropout(1.0, name="all")), "'all': Dropout drops everything"),
    "nested model with other inputs": (
        called_with_others,
        "model 'pair': called with 3 inputs, and it has 2",
    ),
    "two names that become one": (
        lambda: keras.Model(
            pair := [keras.Input((2,), name="a b"), keras.Input((2,), name="a-b")],
            layers.Dense(1)(layers.Dropout(0.5)(layers.Add()(pair))),
        ),
        "input 'a b': as 'a_b' in the signatures it is one of two",
    ),
    "two names that differ in their case": (
        lambda: keras.Model(
            both := [keras.Input((2,), name=name) for name in ("Age", "age")],
            layers.Dense(1)(layers.Dropout(0.5)(layers.Add()(both))),
        ),
        "input 'Age': as 'Age' in the signatures it is one of two",
    ),
    "stateful": (stateful, "'memory': LSTM is stateful|batch size is fixed"),
    "reshaped batch": (reshaped_batch, "input 'x': its batch size is fixed"),
    "certain output": (two_outputs, "output 'certain': no active stochastic layer"),
    "several yes-or-no answers": (
        lambda: table(layers.Dropout(0.5), units=4, activation="sigmoid"),
        "4 separate yes-or-no answers",
    ),
    "several yes-or-no answers as logits": (
        lambda: compiled(
            table(layers.Dropout(0.5), units=4, activation=None), keras.losses.BinaryCrossentropy(from_logits=True)
        ),
        "4 separate yes-or-no answers",
    ),
    "free axes that no trial fits": (
        lambda: keras.Sequential(
            [
                keras.Input((None, 1), name="x"),
                layers.Conv1D(2, 600),
                layers.GlobalMaxPooling1D(),
                layers.Dropout(0.5),
                layers.Dense(1),
            ]
        ),
        "runs with none of the sizes 8, 32, 128, 512 of its free axes",
    ),
    "dropout behind a softmax": (
        lambda: with_late(layers.Dropout(0.1, name="late")),
        "output 'late': with dropout on its values are no probabilities",
    ),
    "noise behind a softmax": (
        lambda: with_late(layers.GaussianNoise(0.1, name="late")),
        "output 'late': with dropout on its values are no probabilities",
    ),
    "weights that are no numbers": (
        lambda: diverged(table(layers.Dropout(0.5))),
        "weight '.*answer/kernel' holds NaN: training diverged",
    ),
    "softmax of one unit": (lambda: table(layers.Dropout(0.5), units=1), "softmax over one unit is always 1"),
    "name of an argument": (
        lambda: table(layers.Dropout(0.5), input=keras.Input((4,), name="seed")),
        "input 'seed': the name is an argument",
    ),
    "name that becomes an argument's": (
        lambda: table(layers.Dropout(0.5), input=keras.Input((4,), name="num-samples")),
        "input 'num-samples': the name is an argument",
    ),
    "sparse input": (
        lambda: table(layers.Dropout(0.5), input=keras.Input((4,), sparse=True, name="x")),
        "input 'x': sparse",
    ),
    "a type that no request carries": (
        lambda: table(layers.Dropout(0.5), input=keras.Input((4,), dtype="bfloat16", name="x")),
        "input 'x': no request carries bfloat16; wanted one of bool, string, float16, float32",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_network_that_cannot_be_honoured_is_refused_by_name(command, desk, case, monkeypatch):
    build, reason = NETWORKS[case]
    build().save(desk / "odd.keras")
    # As in any other process: nobody has registered the class there.
    monkeypatch.delitem(keras.saving.get_custom_objects(), "strange>Strange")
    refused(command, desk, "odd.keras", "--name", "odd", reason=reason)


@pytest.mark.parametrize("case", ["Lambda", "nested Lambda", "custom layer", "custom dropout", "nothing stochastic"])
def test_the_same_from_hdf5(command, desk, case, monkeypatch):
    build, reason = NETWORKS[case]
    build().save(desk / "odd.h5")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "strange>Strange")
    refused(command, desk, "odd.h5", "--name", "odd", reason=reason)


def test_an_operation_is_not_taken_for_foreign_code_in_hdf5(command, desk):
    """Keras writes it there and does not find it again."""
    inputs = keras.Input((4,), name="x")
    x = layers.Dropout(0.5)(keras.ops.absolute(inputs))
    keras.Model(inputs, layers.Dense(1)(x)).save(desk / "odd.h5")
    reason = "is an operation of keras.ops, Absolute, which Keras loads from no HDF5 file; save the model as .keras"
    refused(command, desk, "odd.h5", "--name", "odd", reason=reason)


def test_a_subclassed_model_that_is_not_registered_is_refused_by_name(command, desk):
    subclassed().save(desk / "odd.keras")
    refused(command, desk, "odd.keras", "--name", "odd", reason="is of the class .*StrangeModel")


def test_code_in_a_file_is_never_run(command, desk):
    """A configuration that names a function of another module: as a layer, as a loss, as an argument."""
    victim = desk / "was-here"
    call = {"module": "os", "class_name": "function", "config": "mkdir", "registered_name": "mkdir"}
    with zipfile.ZipFile(desk / "net.keras") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for place in ("layer", "loss", "argument"):
        document = json.loads(files["config.json"])
        if place == "layer":
            document["config"]["layers"][1] = {**call, "config": {"path": str(victim)}, "class_name": "mkdir"}
        elif place == "loss":
            document["compile_config"]["loss"] = {**call, "class_name": "mkdir", "config": {"path": str(victim)}}
        else:
            document["config"]["layers"][2]["config"]["activation"] = call
        with zipfile.ZipFile(desk / "evil.keras", "w") as archive:
            for name, content in {**files, "config.json": json.dumps(document).encode()}.items():
                archive.writestr(name, content)
        if place == "loss":
            assert command("evil.keras", "--name", "evil")[0] == 0
        else:
            refused(command, desk, "evil.keras", "--name", "evil", reason="mkdir")
        assert not victim.exists()


# What is refused: options and rows.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--labels", "a,b"], "2 labels given .a, b., 3 wanted"),
        (["--labels", "a,b,c,d"], "4 labels given"),
        (["--labels", "a,b,a"], "a label is given twice"),
        (["--labels", "a,,b"], "an empty label"),
        (["--labels", "a,b\udcff,c"], r"labels: found b\\xff, which is not UTF-8; wanted text"),
        (["--labels", "a,b,c", "--task", "regression"], "a regression has none"),
        (["--task", "clustering"], "clustering"),
        (["--name", "Not Allowed"], "model name 'Not Allowed'"),
        (["--name", "../up"], "model name"),
        (["--num-samples", "1"], "num-samples"),
        (["--num-samples", "many"], "num-samples"),
        (["--seed", str(2**63)], "seed"),
        (["--calibration", "none.npz"], "none.npz: not found"),
        (["--repository", "net.keras"], "net.keras"),
        (["--unknown", "1"], "--unknown"),
    ],
)
def test_wrong_options_are_refused(command, desk, options, reason):
    refused(command, desk, "net.keras", "--name", "bad", *options, reason=reason)


def test_dropout_behind_a_sigmoid_is_no_probability(command, desk):
    model = with_late(layers.Dropout(0.2, name="late"), units=1, activation="sigmoid")
    networks.scatter(model).save(desk / "late.keras")
    reason = "output 'late': with dropout on its values are no probabilities"
    refused(command, desk, "late.keras", "--name", "bad", "--labels", "no,yes", reason=reason)


def test_a_name_is_wanted(command, desk):
    refused(command, desk, "net.keras", reason="--name")


X, Y = arrays()["x"], arrays()["y"]


def with_value(array, row, value):
    changed = array.astype(np.float64)
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (arrays(y=None), "holds the arrays 'x'; 'x', 'y' wanted"),
        (arrays(x=None), "holds the arrays 'y'; 'x', 'y' wanted"),
        (arrays(z=X), "holds the arrays 'x', 'y', 'z'"),
        (arrays(x=X[:, :3]), r"x: shape \(20, 3\) found, \(rows, 4\) wanted"),
        (arrays(x=X[:, :, None]), r"x: shape \(20, 4, 1\) found"),
        (arrays(x=X[0]), "as many rows in each wanted"),
        (arrays(x=X[:10]), r"x \(10, 4\), y \(20,\); as many rows in each wanted"),
        (arrays(x=X[:0], y=Y[:0]), "at least 1"),
        (arrays(x=np.float32(1)), "as many rows in each wanted"),
        (arrays(x=with_value(X, (7, 2), np.nan)), "x: NaN or infinity found in row 7"),
        (arrays(x=with_value(X, (3, 0), -np.inf)), "x: NaN or infinity found in row 3"),
        (arrays(x=X.astype(str)), "x: type <U.* found, float32 wanted"),
        (arrays(x=X.astype(np.complex64)), "x: type complex64 found"),
        (arrays(x=X.astype(object)), "cannot be read .*Object arrays cannot be loaded"),
        (arrays(y=Y + 1), "y: 3 found in row .*, whole numbers from 0 to 2 wanted"),
        (arrays(y=Y - 1), "y: -1 found in row"),
        (arrays(y=Y + 0.5), "found in row 0, whole numbers"),
        (arrays(y=with_value(Y, 4, np.nan)), "y: NaN or infinity found in row 4"),
        (arrays(y=np.zeros((20, 2))), r"y: shape \(20, 2\) found, \(20\) wanted"),
        (arrays(y=np.full((20, 3), 0.5)), "not one-hot"),
        (arrays(x=with_value(X, (5, 1), 1e300)), "x: 1e.300 found in row 5, beyond float32"),
        (arrays(y=np.array([b"\xff"] * 20)), "y: bytes found that are not UTF-8"),
        (arrays(y=np.array(["d"] * 20)), "y: label 'd' found, one of 0, 1, 2 wanted"),
        (arrays(y=Y.astype(np.complex64)), "y: type complex64 found"),
    ],
)
def test_rows_that_do_not_fit_are_refused(command, desk, change, reason):
    np.savez(desk / "wrong.npz", **change)
    refused(command, desk, "net.keras", "--name", "bad", "--calibration", "wrong.npz", reason=f"wrong.npz: .*{reason}")


def test_rows_that_the_network_overflows_on_are_refused(command, desk):
    networks.scatter(table(layers.Dropout(0.5), units=1, activation=None)).save(desk / "size.keras")
    np.savez(desk / "wrong.npz", x=with_value(X, 5, 1e30), y=X[:, 0])
    options = ("size.keras", "--name", "bad", "--calibration", "wrong.npz")
    refused(command, desk, *options, reason="row 5: the network answers with .*std inf; wanted rows of the size")


def test_a_file_that_holds_no_named_arrays_is_refused(command, desk):
    options = ("net.keras", "--name", "bad", "--calibration", "wrong.npz")
    buffer = io.BytesIO()
    np.save(buffer, X)
    good = (desk / "rows.npz").read_bytes()
    np.savez_compressed(desk / "wrong.npz", **arrays())
    damaged = bytearray((desk / "wrong.npz").read_bytes())
    damaged[60:68] = b"\xff" * 8
    for content in (b"", b"text", buffer.getvalue(), good[: len(good) // 2], good[:-1], bytes(damaged)):
        (desk / "wrong.npz").write_bytes(content)
        refused(command, desk, *options, reason="wrong.npz: (?!.*pickle).*wanted what numpy.savez wrote")


def test_a_promised_error_is_kept_or_everything_is_withheld_with_the_reason(command, desk):
    rows = ("--calibration", "rows.npz")
    code, output, error = command("net.keras", "--name", "promise", *rows, "--max-error", 0.02)
    assert (code, error) == (0, "")
    assert "at least 149 confident ones, all right, are wanted" in " ".join(output.split())
    calibration = verify(desk / "artifacts" / "promise" / "1").calibration
    assert calibration is not None
    [output_calibration] = calibration.outputs.values()
    assert output_calibration.abstention is not None
    assert output_calibration.abstention.answered_share == 0


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--max-error", 0.02], "max-error: found without rows to learn from"),
        (["--coverage", 0.8], "coverage: found without rows to learn from"),
        (["--sets", "aps"], "sets: found without rows to learn from"),
        (["--calibration", "rows.npz", "--max-error", 1.5], "max-error 1.5: wanted a share"),
        (["--calibration", "rows.npz", "--cost-ratio", 0.5], "cost-ratio 0.5: wanted a number above 1"),
    ],
)
def test_promises_that_cannot_be_made_are_refused_in_one_line(command, desk, options, found):
    code, _, error = command("net.keras", "--name", "no-promise", *options)
    assert code == 2
    assert error.count("\n") == 1
    assert found in error
    assert not (desk / "artifacts" / "no-promise").exists()


@pytest.mark.parametrize("option", ["--max-error", "--cost-ratio"])
def test_promises_of_right_answers_are_refused_where_a_row_has_several_numbers(command, desk, option):
    networks.targets_net().save(desk / "targets.keras")
    np.savez(desk / "targets.npz", x=np.zeros((20, 4), np.float32), y=np.zeros((20, 3)))
    options = (
        "targets.keras",
        "--name",
        "targets",
        "--calibration",
        "targets.npz",
        option,
        2 if "cost" in option else 0.1,
    )
    refused(
        command, desk, *options, reason=f"^error: {option[2:]}: only for classes: the answer of a regression is not"
    )
