"""Publishing: what lies in the folder, who can read it, and what happens when it goes wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry
from tensorflow_serving.apis import prediction_log_pb2

from models.artifact import publish
from models.contract import (
    HDF5_FILE,
    KERAS_FILE,
    MANIFEST_FILE,
    SAVED_MODEL_FILE,
    SIGNATURES,
    WARMUP_FILE,
    ArtifactError,
    Feature,
    read_manifest,
    verify,
    versions,
)
from tests.models import networks
from tests.models.artifacts import Artifact
from tests.models.process import ROOT, python
from tests.models.test_invariants import assert_equal, inputs_of


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What lies in it.


@pytest.mark.parametrize("name", ["sonar", "tiny", "norms", "branches"])
def test_manifest_describes_inputs_outputs_and_signatures(request, name):
    artifact = request.getfixturevalue(name)
    manifest = artifact.manifest
    assert set(manifest.signatures) == set(SIGNATURES) == set(artifact.loaded.signatures)
    for signature, described in manifest.signatures.items():
        function = artifact.loaded.signatures[signature]
        _, arguments = function.structured_input_signature
        assert {(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in described.inputs} == {
            (key, spec.dtype.name, tuple(spec.shape)) for key, spec in arguments.items()
        }
        assert {(tensor.name, tensor.dtype) for tensor in described.outputs} == {
            (key, spec.dtype.name) for key, spec in function.structured_outputs.items()
        }
        # TensorFlow Serving's row format wants the rows' axis first in every output.
        assert all(tensor.shape[0] is None for tensor in described.outputs)


def test_manifest_names_every_stochastic_layer_with_its_rate(sonar, norms):
    found = [(layer.index, layer.path, layer.kind, layer.settings) for layer in sonar.manifest.stochastic_layers]
    assert found == [
        (0, "visible_dropout", "Dropout", {"rate": 0.2}),
        (1, "hidden_1_dropout", "Dropout", {"rate": 0.3}),
        (2, "hidden_2_dropout", "Dropout", {"rate": 0.3}),
    ]
    assert [layer.kind for layer in norms.manifest.stochastic_layers] == ["SpatialDropout2D", "Dropout"]


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """Parts that Keras names: by a counter of the process."""

    def __init__(self, **options):
        super().__init__(**options)
        self.parts = [keras.layers.GaussianNoise(0.1), keras.layers.Dropout(0.2), keras.layers.GaussianNoise(0.3)]

    def call(self, inputs, training=False):
        for part in self.parts:
            inputs = part(inputs, training=training)
        return inputs

    def get_config(self):
        # With its name.
        return super().get_config()


def test_a_layers_path_tells_it_apart_and_is_the_same_in_every_process(tmp_path):
    wanted = ["block/gaussian_noise", "block/dropout", "block/gaussian_noise_1"]
    for _ in range(2):
        model = keras.Sequential([keras.Input((3,)), Block(name="block"), keras.layers.Dense(1)])
        manifest = read_manifest(publish(model, name="blocks", repository=tmp_path))
        assert [layer.path for layer in manifest.stochastic_layers] == wanted


def test_keras_files_reload_and_predict_identically(sonar, sonar_model, sonar_rows):
    trained = sonar_model.predict(sonar_rows, verbose=0)
    for name in (KERAS_FILE, HDF5_FILE):
        again = keras.models.load_model(sonar.folder / name)
        np.testing.assert_array_equal(again.predict(sonar_rows, verbose=0), trained, err_msg=name)
        for ours, theirs in zip(again.weights, sonar_model.weights, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name}: {ours.name}")


def test_keras_files_train_on(sonar, sonar_rows):
    again = keras.models.load_model(sonar.folder / KERAS_FILE)
    again.compile("sgd", "binary_crossentropy")
    before = again.get_weights()
    again.fit(sonar_rows[:32], np.zeros(32), epochs=1, verbose=0)
    assert any(not np.array_equal(old, new) for old, new in zip(before, again.get_weights(), strict=True))


def test_deterministic_answer_is_the_trained_networks(sonar, sonar_model, sonar_rows):
    found = sonar.answer("serving_default", sonar_rows)["probabilities"]
    rock = sonar_model.predict(sonar_rows, verbose=0)
    np.testing.assert_allclose(found, np.concatenate([1 - rock, rock], axis=1), atol=1e-6)


def test_warm_up_records_name_every_signature_and_run(sonar, branches):
    for artifact in (sonar, branches):
        seen = []
        for record in tf.data.TFRecordDataset(str(artifact.folder / WARMUP_FILE)):
            log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
            request = log.predict_log.request
            assert request.model_spec.name == artifact.manifest.name
            signature = request.model_spec.signature_name
            seen.append(signature)
            inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
            answers = artifact.loaded.signatures[signature](**inputs)
            assert all(np.isfinite(values).all() for values in answers.values())
        assert seen == list(SIGNATURES)


# Nothing stateful.

# Reading a weight, calling a function, checking an argument: stateful by TensorFlow's flag, but nothing is kept.
HARMLESS = {"ReadVariableOp", "StatefulPartitionedCall", "PartitionedCall", "While", "If", "Assert", "VarHandleOp"}


def operations(artifact: Artifact) -> set[str]:
    """Every operation that any signature, or the adaptive function, can reach."""
    functions = [*artifact.loaded.signatures.values(), *artifact.forms.values(), artifact.loaded.mc_adaptive]
    found = set()
    for function in functions:
        graph = function.graph.as_graph_def()
        found |= {node.op for node in graph.node}
        found |= {node.op for body in graph.library.function for node in body.node_def}
    return found


@pytest.mark.parametrize("name", ["sonar", "tiny", "norms", "branches"])
def test_no_operation_keeps_a_state_between_calls(request, name):
    artifact = request.getfixturevalue(name)
    found = operations(artifact)
    known = {operation: op_def_registry.get(operation) for operation in found}
    stateful = {
        operation for operation, definition in known.items() if definition is not None and definition.is_stateful
    }
    assert stateful <= HARMLESS
    assert not {operation for operation in found if operation.startswith("Assign")}
    assert "StatelessRandomUniformFullIntV2" in found


@pytest.mark.parametrize("name", ["sonar", "tiny", "norms", "branches"])
def test_checkpoint_holds_weights_their_forms_axes_of_novelty_and_kept_masks_only(request, name):
    artifact = request.getfixturevalue(name)
    names = [key for key, _ in tf.train.list_variables(str(artifact.folder / "variables" / "variables"))]
    kinds = {key.split("/")[0] for key in names}
    assert kinds <= {"weights", "forms", "novelty", "kept_masks", "_CHECKPOINTABLE_OBJECT_GRAPH"}
    assert not [key for key in names if "seed" in key.lower()]


def test_saved_model_is_tagged_to_serve(sonar):
    message = saved_model_pb2.SavedModel.FromString((sonar.folder / SAVED_MODEL_FILE).read_bytes())
    assert [list(graph.meta_info_def.tags) for graph in message.meta_graphs] == [["serve"]]


# Without this project, and without Keras.

BLOCKED = """
import sys
from importlib.machinery import ModuleSpec

class Blocker:
    # TensorFlow looks where Keras lies (and imports it only where tf.keras is used): it may find it, not run it.
    names = {"models", "training", "serving", "loadtest", "dropserve", "keras", "tf_keras"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return ModuleSpec(name, self, origin="/blocked/__init__.py")

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")

    exec_module = create_module

sys.meta_path.insert(0, Blocker())
import json
import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
rows = tf.constant(np.load(sys.argv[2]))
draws = {"num_samples": tf.constant(60), "seed": tf.constant(17, tf.int64)}
answers = {
    "serving_default": loaded.signatures["serving_default"](features=rows),
    "mc_predict": loaded.signatures["mc_predict"](features=rows),
    "mc_sample": loaded.signatures["mc_sample"](features=rows, **draws),
    "mc_draws": loaded.signatures["mc_draws"](features=rows, **draws),
    "mc_adaptive": loaded.mc_adaptive(
        features=rows, seed=tf.constant(17, tf.int64), tolerance=tf.constant(0.01), max_samples=tf.constant(500)
    ),
}
assert not [name for name in sys.modules if name.partition(".")[0] in Blocker.names]
for name in sorted(Blocker.names):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} was importable: the test shows nothing")
plain = {key: {name: value.numpy().tolist() for name, value in of.items()} for key, of in answers.items()}
json.dump(plain, sys.stdout)
"""


def test_loads_and_answers_where_keras_and_this_project_cannot_be_imported(sonar, sonar_rows, tmp_path):
    np.save(tmp_path / "rows.npy", sonar_rows[:5])
    answers = json.loads(python(BLOCKED, sonar.folder, tmp_path / "rows.npy", cwd=tmp_path))
    rows = sonar_rows[:5]
    expected = {
        "serving_default": sonar.answer("serving_default", rows),
        "mc_predict": sonar.answer("mc_predict", rows),
        "mc_sample": sonar.sample(rows, 60, 17),
        "mc_draws": {"draws": sonar.draws(rows, 60, 17)},
        "mc_adaptive": sonar.adaptive(rows, 0.01, 500, 17),
    }
    assert answers.keys() == expected.keys()
    for signature, found in answers.items():
        assert_equal({name: np.array(values) for name, values in found.items()}, expected[signature])


def test_answers_under_tensorflows_own_command_line(sonar, sonar_rows, tmp_path):
    for name, value in {"rows": sonar_rows[:3], "draws": np.int32(60), "seed": np.int64(17)}.items():
        np.save(tmp_path / f"{name}.npy", value)
    subprocess.run(
        [
            Path(sys.executable).with_name("saved_model_cli"),
            *("run", "--dir", sonar.folder, "--tag_set", "serve", "--signature_def", "mc_sample"),
            *("--inputs", "features=rows.npy;num_samples=draws.npy;seed=seed.npy", "--outdir", "out"),
        ],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    found = {path.stem: np.load(path) for path in (tmp_path / "out").glob("*.npy")}
    assert_equal(found, sonar.sample(sonar_rows[:3], 60, 17))


IMPORT = """
import sys
from pathlib import Path
from models.bento_store import import_artifact
folder = Path(sys.argv[1])
tags = [import_artifact(folder), import_artifact(folder)]
import bentoml
print(*tags, bentoml.models.get(tags[0]).path, len(bentoml.models.list()))
"""


def test_import_into_bentomls_store_copies_the_whole_artifact(tiny, tmp_path):
    home = tmp_path / "bentoml"
    output = python(IMPORT, tiny.folder, BENTOML_HOME=str(home), BENTOML_DO_NOT_TRACK="True")
    first, second, path, count = output.split()
    assert first == second == "tiny:1"
    assert count == "1"
    assert Path(path).is_relative_to(home)
    assert verify(Path(path)) == tiny.manifest
    copied = Artifact(Path(path))
    batch = inputs_of(tiny, 4)
    assert_equal(copied.sample(batch, 50, 3), tiny.sample(batch, 50, 3))


def test_a_store_that_cannot_be_written_is_named_and_the_artifact_stays(tiny, tmp_path):
    (tmp_path / "store").write_text("not a folder")
    script = """
import sys
from pathlib import Path
from models.bento_store import import_artifact
from models.contract import ArtifactError
try:
    import_artifact(Path(sys.argv[1]))
except ArtifactError as error:
    print(error)
"""
    output = python(script, tiny.folder, BENTOML_HOME=str(tmp_path / "store"), BENTOML_DO_NOT_TRACK="True")
    assert output.startswith(f"{tiny.folder}: it is published, but BentoML's own store cannot take it (")
    assert output.count("\n") == 1
    assert verify(tiny.folder) == tiny.manifest


# When it goes wrong.


def without_dropout() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


@keras.saving.register_keras_serializable(package="tests")
class OnlyInTraining(keras.layers.Layer):
    """Dropout that inference never reaches: an idiom of old code."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.drop = keras.layers.Dropout(0.5, name="drop")

    def call(self, inputs, training=False):
        return self.drop(inputs, training=training) if training else inputs


@keras.saving.register_keras_serializable(package="tests")
class TwoAnswers(keras.Model):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.drop, self.first, self.second = keras.layers.Dropout(0.5), keras.layers.Dense(1), keras.layers.Dense(2)

    def call(self, inputs, training=False):
        kept = self.drop(inputs, training=training)
        return self.first(kept), self.second(kept)


def idle_dropout() -> keras.Model:
    inputs = keras.Input((2,))
    hidden = OnlyInTraining()(inputs)
    return keras.Model(
        inputs, [keras.layers.Dense(1)(hidden), keras.layers.Dense(1)(keras.layers.Dropout(0.5)(hidden))]
    )


def two_answers() -> keras.Model:
    model = TwoAnswers()
    model(np.zeros((1, 3)))
    return model


@pytest.mark.parametrize(
    ("build", "arguments", "reason"),
    [
        (without_dropout, {}, "no layer of the network is stochastic"),
        (idle_dropout, {}, "layer 'only_in_training.*/drop': it is never called with training=False"),
        (two_answers, {}, "model 'two_answers.*': a subclassed model of 2 outputs, which have no names"),
        (networks.tiny_net, {"labels": ["a", "b"]}, "2 labels given"),
        (networks.tiny_net, {"num_samples": 1}, "num_samples: 1 found"),
        (networks.tiny_net, {"name": "../outside"}, "model name"),
        (networks.tiny_net, {"features": [Feature(name="a", kind="numeric")]}, "1 features were named"),
    ],
)
def test_a_failed_publish_leaves_the_repository_unchanged(tmp_path, build, arguments, reason):
    repository = tmp_path / "artifacts"
    publish(networks.tiny_net(), name="net", repository=repository)
    before = tree(tmp_path)
    for name in ("net", "other"):
        with pytest.raises(ArtifactError, match=reason) as caught:
            publish(build(), **{"name": name, "repository": repository, **arguments})
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    assert sorted(path.name for path in repository.iterdir()) == ["net"]
    assert [path.name for path in (repository / "net").iterdir()] == ["1"]


def test_a_failed_first_publish_makes_no_repository(tmp_path):
    with pytest.raises(ArtifactError):
        publish(without_dropout(), name="net", repository=tmp_path / "artifacts")
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError, match="file"):
        publish(networks.tiny_net(), name="net", repository=tmp_path / "file")


PUBLISH = """
import sys
from pathlib import Path
from models.artifact import publish
from tests.models import networks
for _ in range(int(sys.argv[2])):
    print(publish(networks.tiny_net(), name="net", repository=Path(sys.argv[1])).name, flush=True)
"""

# Never gets beyond the moment before the version is there.
HELD = """
import os, time
os.rename = lambda *_: time.sleep(600)
"""


def publisher(repository: Path, times: int, script: str = PUBLISH) -> subprocess.Popen:
    command = [sys.executable, "-c", script, str(repository), str(times)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("written", [KERAS_FILE, MANIFEST_FILE])
def test_a_publisher_killed_half_way_leaves_no_version(tmp_path, written):
    process = publisher(tmp_path, 1, HELD + PUBLISH)
    try:
        while not list(tmp_path.glob(f"net/.publishing-*/{written}")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        output, _ = process.communicate()
    assert output == ""
    assert versions(tmp_path, "net") == []
    again = publish(networks.tiny_net(), name="net", repository=tmp_path)
    assert again.name == "1"
    verify(again)


def test_concurrent_publishers_get_versions_of_their_own(tmp_path):
    processes = [publisher(tmp_path, 2) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(int(version) for output in outputs for version in output) == [1, 2, 3, 4]
    for version in versions(tmp_path, "net"):
        assert verify(tmp_path / "net" / str(version)).version == version
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["1", "2", "3", "4"]
