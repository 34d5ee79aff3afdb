"""`dropserve evaluate`: its figures against oracles over the artifact's own signatures; bad input in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    log_loss,
    roc_auc_score,
    root_mean_squared_error,
)

import dropserve
from models.artifact import publish
from models.contract import Manifest, ModelInput, ModelOutput, Temperature
from tests.models import networks
from tests.models.artifacts import Artifact
from tests.serving.versions import publish_as
from training import held_out, images
from training.artifact_answers import without_temperature
from training.assessment import class_scores
from training.datasets import load
from training.errors import InputError
from training.outliers import made
from training.pipeline import train, training_data
from training.plan import plan
from training.progress import Reporter
from training.splits import split

GUESTS = "age,town,member,visits,returns,floor"


def guests(rows: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    lines = [GUESTS]
    for _ in range(rows):
        member, visits = random.random() < 0.4, random.integers(1, 12)
        age = random.integers(18, 80) if random.random() < 0.7 else ""
        answer = "yes" if random.random() < (0.85 if member else 0.08 * visits) else "no"
        town, floor = random.choice(["Ulm", "Rome", "Oslo"]), random.choice(["up", "down"])
        lines.append(f"{age},{town},{str(member).lower()},{visits},{answer},{floor}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with trained models in ./artifacts and files to judge them by."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "guests.csv").write_text(guests(200))
    (folder / "new.csv").write_text(guests(60, seed=1))
    requests = {
        "sonar": {},
        "diabetes": {},
        str(folder / "guests.csv"): {"target": "returns", "types": ["floor=ignored"]},
    }
    for data, options in requests.items():
        request = {"seed": 0, "num_samples": 30, "epochs": 8, "repository": folder / "artifacts", **options}
        train(plan(data, **request), Reporter(quiet=True))
    return folder


def test_bundled_data_are_judged_on_their_test_rows_as_the_signatures_answer(desk, judged):
    found = judged("sonar", "sonar")
    data, artifact = load("sonar"), Artifact(desk / "artifacts" / "sonar" / "1")
    rows = split(data.y, data.task).test
    assert found["model"] == {"name": "sonar", "version": "1"}
    assert (found["data"]["rows"], found["data"]["which"]) == (42, "the 42 test rows")
    assert (found["num_samples"], found["seed"], found["task"]) == (30, 0, "classification")
    y = data.y[rows]
    for kind, signature in (("deterministic", "serving_default"), ("mc", "mc_predict")):
        p = artifact.answer(signature, data.x[rows])["probabilities"].astype(np.float64)
        p /= p.sum(axis=1, keepdims=True)
        figures = found["answers"][kind]
        assert figures["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(axis=1)))
        if kind == "mc" and "mc_calibrated" in found["answers"]:
            continue
        assert figures["nll"] == pytest.approx(log_loss(y, p), rel=1e-6)
        parts = figures["reliability"] - figures["resolution"] + figures["uncertainty"]
        assert figures["brier"] == pytest.approx(parts)
        assert figures["risk_coverage"]["1"] == pytest.approx(1 - figures["accuracy"])
        assert figures["accuracy_rejection"]["0"] == pytest.approx(figures["accuracy"])
        assert sum(figures["reliability_curve"]["rows"]) == 42
        for name, (lower, upper) in figures["intervals"].items():
            assert lower <= upper, name
        lower, upper = figures["intervals"]["nll"]
        assert lower < figures["nll"] < upper


def test_differences_are_between_the_served_and_the_deterministic_answers(judged):
    found = judged("sonar", "sonar")
    served = found["differences"]["of"]
    assert found["differences"]["to"] == "deterministic"
    for name in ("nll", "ece", "accuracy"):
        wanted = found["answers"][served][name] - found["answers"]["deterministic"][name]
        assert found["differences"][name]["value"] == pytest.approx(wanted)


def test_prediction_sets_and_abstention_are_those_of_the_signature(desk, judged):
    found = judged("sonar", "sonar")
    data, artifact = load("sonar"), Artifact(desk / "artifacts" / "sonar" / "1")
    rows = split(data.y, data.task).test
    served = artifact.answer("mc_predict", data.x[rows])
    calibration = artifact.manifest.calibration
    assert calibration is not None
    [coverage] = [one for one in found["coverage"] if one["wanted"] == calibration.coverage]
    assert coverage["found"] == pytest.approx(served["prediction_set"][np.arange(42), data.y[rows]].mean())
    assert coverage["size"] == pytest.approx(served["prediction_set"].sum(axis=1).mean())
    assert coverage["lower"] <= coverage["found"] <= coverage["upper"]
    assert found["abstention"]["answered_share"] == pytest.approx(1 - served["abstain"].mean())
    by_class = found["by_class"].values()
    assert sum(group["rows"] * group["coverage"] for group in by_class) == pytest.approx(42 * coverage["found"])


def test_mc_is_the_network_s_own_draws_and_mc_calibrated_what_is_served(desk, judged):
    found = judged("sonar", "sonar")
    data, artifact = load("sonar"), Artifact(desk / "artifacts" / "sonar" / "1")
    rows = split(data.y, data.task).test
    known = artifact.manifest.calibrated(artifact.manifest.outputs[0])
    assert known is not None
    fit = known.fit
    assert isinstance(fit, Temperature)
    assert ("mc_calibrated" in found["answers"]) == (fit.value != 1)
    network = keras.models.load_model(artifact.folder / "model.keras", compile=False)
    bare = Artifact(publish(network, name="bare", repository=desk / "bare", num_samples=30))
    for kind, asked in (("mc", bare), (found["differences"]["of"], artifact)):
        p = asked.answer("mc_predict", data.x[rows])["probabilities"].astype(np.float64)
        wanted = log_loss(data.y[rows], p / p.sum(axis=1, keepdims=True))
        assert found["answers"][kind]["nll"] == pytest.approx(wanted, rel=1e-4)


def test_classes_and_subgroups_share_the_rows_among_them(desk, judged):
    found = judged("guests", "new.csv", "--target", "returns", "--subgroup", "town")
    assert found["data"] == {"name": "new.csv", "rows": 60, "which": "all 60 rows", "subgroup": "town"}
    assert set(found["by_subgroup"]) == {"Oslo", "Rome", "Ulm"}
    for groups in (found["by_class"], found["by_subgroup"]):
        assert sum(group["rows"] for group in groups.values()) == 60
        overall = sum(group["rows"] * group["accuracy"] for group in groups.values()) / 60
        assert overall == pytest.approx(found["answers"][found["differences"]["of"]]["accuracy"])
    artifact = Artifact(desk / "artifacts" / "guests" / "1")
    lines = [line.split(",") for line in (desk / "new.csv").read_text().splitlines()[1:]]
    age, town, member, visits, returns, _ = zip(*lines, strict=True)
    inputs = {
        "age": np.array([float(value or "nan") for value in age], np.float32),
        "town": np.array(town, object),
        "member": np.array([value == "true" for value in member]),
        "visits": np.array(visits, np.float32),
    }
    right = artifact.answer("mc_predict", inputs)["probabilities"].argmax(axis=1) == [x == "yes" for x in returns]
    for name, group in found["by_subgroup"].items():
        chosen = np.array(town) == name
        assert group["accuracy"] == pytest.approx(right[chosen].mean())
        assert group["rows"] == chosen.sum()


def test_a_column_that_the_model_does_not_take_makes_subgroups_too_and_the_target_is_what_is_left(judged):
    assert set(judged("guests", "new.csv", "--subgroup", "floor")["by_subgroup"]) == {"up", "down"}


def test_the_same_rows_in_parquet_give_the_same_figures(desk, judged):
    pa.parquet.write_table(pa.csv.read_csv(desk / "new.csv"), desk / "new.parquet")
    first = judged("guests", "new.csv", "--target", "returns")
    second = judged("guests", "new.parquet", "--target", "returns")
    assert first["answers"] == second["answers"]


def test_of_the_file_that_trained_the_model_only_the_test_rows_are_judged(desk, judged):
    found = judged("guests", "guests.csv", "--target", "returns")
    assert (found["data"]["rows"], found["data"]["which"]) == (40, "the 40 test rows")
    assert any("trained the model" in note for note in found["notes"])
    changed = (desk / "guests.csv").read_text().replace("Ulm", "Bonn", 1)
    (desk / "changed.csv").write_text(changed)
    assert judged("guests", "changed.csv", "--target", "returns")["data"]["rows"] == 200
    (desk / "copy.csv").write_text((desk / "guests.csv").read_text())
    again = judged("guests", "copy.csv", "--target", "returns")
    assert again["data"] | {"name": "guests.csv"} == found["data"]
    assert again["answers"] == found["answers"]
    assert any("copy.csv trained the model" in note for note in again["notes"])


def test_regression_is_judged_as_the_signatures_answer(desk, judged):
    found = judged("diabetes", "diabetes", "--subgroup", "sex")
    data, artifact = load("diabetes"), Artifact(desk / "artifacts" / "diabetes" / "1")
    rows = split(data.y, data.task).test
    y, mc = data.y[rows].astype(np.float64), artifact.answer("mc_predict", data.x[rows])
    deterministic = artifact.answer("serving_default", data.x[rows])["mean"]
    figures = found["answers"]
    assert figures["deterministic"]["rmse"] == pytest.approx(root_mean_squared_error(y, deterministic))
    assert figures["deterministic"]["crps"] == pytest.approx(np.abs(y - deterministic).mean())
    assert figures["mc"]["rmse"] == pytest.approx(root_mean_squared_error(y, mc["mean"]), rel=1e-5)
    draws = artifact.draws(data.x[rows], 30).astype(np.float64)
    pairs = np.abs(draws[:, :, None] - draws[:, None]).mean(axis=(1, 2))
    wanted = np.mean(np.abs(draws - y[:, None]).mean(axis=1) - pairs / 2)
    assert figures["mc"]["crps"] == pytest.approx(wanted, rel=1e-5)
    assert sum(figures["mc"]["pit_histogram"]) == 88
    assert {group["rows"] for group in found["by_subgroup"].values()} == set(
        np.unique(data.x[rows, 1], return_counts=True)[1]
    )


def test_arrays_of_a_packaged_network_with_several_outputs(desk, judged):
    shared = inputs = keras.Input((4,), name="x")
    shared = keras.layers.Dropout(0.5)(shared)
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(shared)
    size = keras.layers.Dense(1, name="size")(shared)
    model = networks.scatter(keras.Model(inputs, {"kind": kind, "size": size}))
    artifact = Artifact(publish(model, name="both", repository=desk / "artifacts"))
    random = np.random.default_rng(0)
    x, y = random.normal(size=(30, 4)).astype(np.float32), random.integers(0, 3, 30)
    np.savez(desk / "rows.npz", x=x, y_kind=y, y_size=random.normal(size=30))
    found = judged("both", "rows.npz")["outputs"]
    assert set(found) == {"kind", "size"}
    p = artifact.answer("serving_default", x)["kind_probabilities"].astype(np.float64)
    assert found["kind"]["answers"]["deterministic"]["nll"] == pytest.approx(
        log_loss(y, p / p.sum(axis=1, keepdims=True), labels=[0, 1, 2]), rel=1e-6
    )
    assert found["size"]["task"] == "regression"


def test_outliers_are_scored_by_what_the_signatures_say_of_them(desk, judged):
    found = judged("sonar", "sonar")["outliers"]
    data, artifact = load("sonar"), Artifact(desk / "artifacts" / "sonar" / "1")
    x = data.x[split(data.y, data.task).test]
    for kind, inputs in made(artifact.manifest, {"features": x}).items():
        known, strange = (artifact.answer("mc_predict", rows)["mutual_information"] for rows in (x, inputs["features"]))
        wanted = roc_auc_score(np.repeat([0, 1], [len(known), len(strange)]), np.concatenate([known, strange]))
        assert found[kind]["mutual_information"]["auroc"] == pytest.approx(wanted)


@pytest.mark.parametrize("rows", ["odd.csv", "odd.npz"])
def test_outliers_that_someone_names_are_scored_beside_those_that_are_made(desk, judged, rows):
    """Rows without answers: a file with other columns beside the inputs, and arrays."""
    data, artifact = load("sonar"), Artifact(desk / "artifacts" / "sonar" / "1")
    odd = np.random.default_rng(3).uniform(0, 1, (70, 60)).astype(np.float32)
    np.savez(desk / "odd.npz", x=odd, taken=np.arange(70))
    lines = [",".join((*data.columns, "ship")), *[",".join([*map(str, row.tolist()), "Ada"]) for row in odd]]
    (desk / "odd.csv").write_text("\n".join(lines))
    found = judged("sonar", "sonar", "--version", 1, "--outliers", rows)
    assert list(found["outliers"]) == ["far", "shuffled", rows]
    assert f"{rows}: 70 outliers" in found["notes"]
    x = data.x[split(data.y, data.task).test]
    for score, figures in found["outliers"][rows].items():
        known, strange = (artifact.answer("mc_predict", values)[score] for values in (x, odd))
        is_odd, values = np.repeat([0, 1], [len(x), 70]), np.concatenate([known, strange])
        assert figures["auroc"] == pytest.approx(roc_auc_score(is_odd, values))
        assert figures["aupr"] == pytest.approx(average_precision_score(is_odd, values))
        # The false alarms at the highest threshold that finds 95 % of them.
        threshold = np.sort(strange)[::-1][int(np.ceil(0.95 * 70)) - 1]
        assert figures["fpr95"] == pytest.approx((known >= threshold).mean())
    assert {"predictive_entropy", "mutual_information", "novelty"} <= set(found["outliers"][rows])


def test_of_the_images_that_trained_the_model_only_the_test_rows_are_judged(tmp_path):
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(30):
            pixels = random.integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{number}.png")
    data = images.read(tmp_path / "pets")
    rows = split(data.y, data.task)
    manifest = Manifest.model_construct(
        name="pets",
        inputs=[ModelInput.model_validate({"name": "image", "dtype": "float32", "shape": [8, 8, 1]})],
        outputs=[ModelOutput.model_construct(name="class", task="classification", labels=["cat", "dog"])],
        training_data=training_data(data, rows),
    )
    shutil.copytree(tmp_path / "pets", tmp_path / "copy")
    for folder in ("pets", "copy"):
        found = held_out.read(str(tmp_path / folder), manifest)
        assert found.described == "the 12 test rows"
        np.testing.assert_array_equal(found.inputs["image"], data.x[rows.test])
        np.testing.assert_array_equal(found.targets[0], data.y[rows.test])
        assert any(f"{folder}-images trained the model" in note for note in found.notes)
    (tmp_path / "copy" / "cat" / "0.png").unlink()
    assert held_out.read(str(tmp_path / "copy"), manifest).described == "all 59 images"


def test_bundled_data_and_images_in_a_folder_can_be_the_outliers(tmp_path):
    inputs = [ModelInput.model_validate({"name": "image", "dtype": "float32", "shape": [8, 8, 1]})]
    manifest = Manifest.model_construct(name="digits", inputs=inputs)
    [(name, found)] = held_out.outliers("digits", manifest).items()
    assert (name, found["image"].shape) == ("digits", (1797, 8, 8, 1))
    letters = tmp_path / "letters" / "below"
    letters.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((8, 8), 50 * number, np.uint8)).save(letters / f"{number}.png")
    [(name, found)] = held_out.outliers(str(letters.parent), manifest).items()
    assert name == "letters-images"
    assert found["image"][:, 3, 3, 0].tolist() == [0, 50, 100]
    Image.new("RGB", (8, 8)).save(letters / "3.png")
    with pytest.raises(InputError, match=r"its images are \[8, 8, 3\]; digits takes image \[8, 8, 1\]"):
        held_out.outliers(str(letters.parent), manifest)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in it"):
        held_out.outliers(str(tmp_path / "empty"), manifest)


def test_tables_for_people(command):
    code, output, error = command("sonar", "sonar")
    assert (code, error) == (0, "")
    for word in ("42 test rows", "deterministic", "nll", "ece", "mine", "50%: accuracy of the rest", "95 % intervals"):
        assert word in output


def test_older_versions_are_judged_where_they_are_asked_for(desk, judged, command):
    publish_as(desk / "artifacts" / "sonar" / "1", desk / "artifacts", 2)
    assert judged("sonar", "sonar")["model"]["version"] == "2"
    assert judged("sonar", "sonar", "--version", 1)["model"]["version"] == "1"
    assert "no version 3, wanted one of 1, 2" in command("sonar", "sonar", "--version", 3)[2]


def arrays_of_guests(**changes):
    usual = {
        "age": np.array([np.nan, 31.0, 40.0, 77.0]),
        "town": np.char.encode(["Ulm", "Rome", "Öland", "Oslo"], "utf-8"),
        "member": np.array([True, False, True, False]),
        "visits": np.array([1.0, 2.0, 3.0, 11.0]),
        "y": np.array(["no", "yes", "yes", "no"]),
    }
    return {**usual, **changes}


def test_index_of_a_pandas_table_is_no_target(desk, judged):
    rows = pandas.read_csv(desk / "new.csv", dtype={"town": str})
    rows[rows.index != 7].drop(columns="floor").to_parquet(desk / "filtered.parquet")
    assert judged("guests", "filtered.parquet")["data"]["rows"] == len(rows) - 1


def test_arrays_may_miss_what_the_table_missed(desk, judged):
    """A value, in a column that is nullable, is NaN; texts may be bytes. Beside the same rows as a table."""
    np.savez(desk / "four.npz", **arrays_of_guests())
    lines = [GUESTS, ",Ulm,true,1,no,up", "31,Rome,false,2,yes,up", "40,Öland,true,3,yes,up", "77,Oslo,false,11,no,up"]
    (desk / "four.csv").write_text("\n".join(lines) + "\n")
    found = judged("guests", "four.npz")
    assert found["data"]["rows"] == 4
    assert found["answers"] == judged("guests", "four.csv", "--target", "returns")["answers"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"visits": np.array([1, np.nan, 3, 4])}, "visits: no value in row 1, where one was never missing"),
        ({"town": np.array(["Ulm", "Rome", "", "Oslo"])}, "town: no value in row 2"),
        ({"age": np.array([1, np.inf, 3, 4])}, "age: NaN or infinity found in row 1"),
        ({"age": np.array([1, 2, 3, 1e300])}, "age: 1e+300 found in row 3, beyond float32"),
        ({"town": np.array([b"Ulm", b"\xff", b"", b"Oslo"])}, "town: bytes found that are not UTF-8"),
    ],
)
def test_arrays_that_the_model_cannot_answer_are_one_line_and_exit_code_2(desk, command, change, named):
    np.savez(desk / "four.npz", **arrays_of_guests(**change))
    code, output, error = command("guests", "four.npz")
    assert (code, output) == (2, "")
    [line] = error.splitlines()
    assert named in line


def test_rows_that_the_network_overflows_on_are_one_line_and_exit_code_2(desk, command):
    x = np.ones((3, 10))
    x[1] = 1e30
    np.savez(desk / "far.npz", x=x, y=np.zeros(3))
    code, output, error = command("diabetes", "far.npz")
    assert (code, output) == (2, "")
    assert error.startswith("error: row 1: the network answers with epistemic_std inf; wanted rows of the size")


def edited(change):
    """new.csv with a change to its lines."""
    return "\n".join(change(guests(60, seed=1).splitlines())) + "\n"


# What is asked, the contents of rows.csv, and what the one line must say.
BAD = {
    "unknown model": (["sonr", "sonar"], "", ["no model 'sonr'", "diabetes, guests, sonar"]),
    "unknown data": (["sonar", "sonr"], "", ["'sonr'", "wanted one of sonar"]),
    "data of another shape": (["sonar", "digits"], "", ["image [8, 8, 1]", "features [60]"]),
    "data of other columns": (["diabetes", "wine"], "", ["wine", "features [13]", "features [10]"]),
    "target of another data set": (["sonar", "sonar", "--target", "price"], "", ["'price'", "'object'"]),
    "unknown subgroup of bundled data": (["sonar", "sonar", "--subgroup", "town"], "", ["'town'", "band_01"]),
    "unknown outliers": (["sonar", "sonar", "--outliers", "sonr"], "", ["'sonr'", "wanted one of sonar"]),
    "outliers of another shape": (["sonar", "sonar", "--outliers", "wine"], "", ["wine", "features [60]"]),
    "outliers without a column": (
        ["guests", "new.csv", "--target", "returns", "--outliers", "rows.csv"],
        "age,town\n1,Ulm\n",
        ["rows.csv", "no column member, visits"],
    ),
    "outliers without arrays": (["sonar", "sonar", "--outliers", "none.npz"], "", ["none.npz", "not found"]),
    "subgroup of too many values": (["diabetes", "diabetes", "--subgroup", "s1"], "", ["'s1'", "at most 50"]),
    "no such file": (["guests", "none.csv"], "", ["none.csv", "not found"]),
    "no such arrays": (["sonar", "none.npz"], "", ["none.npz", "not found"]),
    "a target for arrays": (["sonar", "rows.npz", "--target", "y"], "", ["--target", "rows.npz"]),
    "no rows": (["guests", "rows.csv"], GUESTS + "\n", ["no rows"]),
    "no target": (["guests", "rows.csv"], guests(3), ["--target COLUMN", "returns, floor"]),
    "a target that is not there": (["guests", "rows.csv", "--target", "back"], guests(3), ["'back'", "returns"]),
    "an input as target": (["guests", "rows.csv", "--target", "town"], guests(3), ["'town'", "predicts from"]),
    "a missing column": (["guests", "rows.csv"], "age,town,returns\n1,Ulm,yes\n", ["no column member, visits"]),
    "nothing left but the subgroups": (
        ["guests", "rows.csv", "--subgroup", "floor"],
        "age,town,member,visits,floor\n30,Ulm,true,3,up\n",
        ["no target; wanted --target COLUMN, floor\n"],
    ),
    "nothing left": (
        ["guests", "rows.csv", "--subgroup", "town"],
        "age,town,member,visits\n30,Ulm,true,3\n",
        ["no column beside those that guests predicts from; wanted one with the answers\n"],
    ),
    "nothing left, and an input as target": (
        ["guests", "rows.csv", "--target", "town"],
        "age,town,member,visits\n30,Ulm,true,3\n",
        ["no column beside those that guests predicts from; wanted one with the answers\n"],
    ),
    "blanks around names": (
        ["guests", "rows.csv"],
        guests(3).replace("town", " town").replace("floor", "floor "),
        ["no column town, which", "found age, ' town', member, visits, returns, 'floor '"],
    ),
    "a subgroup that is not there": (
        ["guests", "rows.csv", "--target", "returns", "--subgroup", "wing"],
        guests(3),
        ["'wing'", "floor"],
    ),
    "an unknown label": (
        ["guests", "rows.csv", "--target", "returns"],
        edited(lambda lines: [*lines[:3], lines[3].replace("yes", "perhaps").replace("no", "perhaps"), *lines[4:]]),
        ["unknown label 'perhaps' in row 3", "no, yes"],
    ),
    "no answer": (
        ["guests", "rows.csv", "--target", "returns"],
        edited(lambda lines: [*lines[:2], "30,Ulm,true,3,,up", *lines[2:]]),
        ["'returns'", "no value in row 2"],
    ),
    "text for a number": (
        ["guests", "rows.csv", "--target", "returns"],
        edited(lambda lines: [*lines, "30,Ulm,true,many,no,up"]),
        ["'visits'", "'many' in row 61"],
    ),
    "a value missing that never was": (
        ["guests", "rows.csv", "--target", "returns"],
        edited(lambda lines: [*lines, "30,Ulm,true,,no,up"]),
        ["'visits'", "no value in row 61"],
    ),
}


@pytest.mark.parametrize(("arguments", "text", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(desk, command, arguments, text, named):
    (desk / "rows.csv").write_text(text)
    code, output, error = command(*arguments)
    assert (code, output) == (2, "")
    [line] = error.splitlines()
    assert line.startswith("error: ")
    for word in named:
        assert word in error


def test_as_a_real_process(desk):
    root = Path(dropserve.__file__).parent
    result = subprocess.run(
        [sys.executable, root / "dropserve.py", "evaluate", "sonar", "sonar", "--version", "1", "--json"],
        check=False,
        cwd=desk,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["data"]["rows"] == 42


# Parts.


def test_a_temperature_divided_out_gives_the_draws_as_they_were():
    random = np.random.default_rng(0)
    draws = random.dirichlet(np.ones(4), (50, 20))
    cooled = draws ** (1 / 0.6) / (draws ** (1 / 0.6)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(without_temperature(cooled.astype(np.float32), 0.6), draws.mean(axis=1), atol=1e-5)


def test_aps_scores_are_the_sum_of_what_is_at_least_as_probable():
    p = np.array([[0.5, 0.2, 0.3], [0.25, 0.5, 0.25]])
    np.testing.assert_allclose(class_scores(p, "aps"), [[0.5, 1.0, 0.8], [1.0, 0.5, 1.0]])
    np.testing.assert_allclose(class_scores(p, "lac"), 1 - p)


@pytest.mark.parametrize("shape", [(50, 8, 8, 1), (50, 6)])
def test_outliers_are_made_in_the_form_of_the_rows(shape):
    rows = np.random.default_rng(0).uniform(0, 16, shape).astype(np.float32)
    inputs = [{"name": "x", "dtype": "float32", "shape": list(shape[1:])}]
    manifest = Manifest.model_construct(inputs=[ModelInput.model_validate(item) for item in inputs])
    kinds = made(manifest, {"x": rows})
    assert len(kinds) >= 2
    for values in kinds.values():
        assert values["x"].shape[1:] == shape[1:]
        assert np.isfinite(values["x"]).all()
    again = made(manifest, {"x": rows})
    assert all(np.array_equal(values["x"], again[kind]["x"]) for kind, values in kinds.items())
