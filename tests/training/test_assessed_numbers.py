"""`dropserve evaluate` of regressions with several numbers a row: each is judged as a network for it alone would be."""

from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import kstest, norm
from sklearn.metrics import log_loss, roc_auc_score, root_mean_squared_error

from models.artifact import publish
from models.contract import OutputCalibration, TargetNoises, read_manifest
from models.holdout import KnownRows, PlacesError
from tests.models.artifacts import Artifact
from tests.models.networks import scatter, targets_net
from training import assessment_summary, held_out
from training.artifact_answers import Artifact as Answering
from training.assessment import CannotJudge, assess
from training.held_out import HeldOut
from training.numbers import MOST
from training.numbers import calibration_of as calibration_of_number

DRAWS, ROWS = 40, 120
# Of the targets' own noise.
NOISES = (0.5, 3.0, 0.1)
NAMES = ["targets[0]", "targets[1]", "targets[2]"]


def rows_of(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 4)).astype(np.float32)
    return x, np.asarray(targets_net()(x, training=False)) + random.normal(size=(count, 3)) * NOISES


X, Y = rows_of(ROWS, 1)
FAR = 10 * X[:50]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with `together`, of three numbers a row, `alone-0` and on, of one of them each, and rows to judge by."""
    folder = tmp_path_factory.mktemp("desk")
    x, y = rows_of(200, 0)
    options = {"repository": folder / "artifacts", "num_samples": DRAWS}
    publish(targets_net(), name="together", holdout=KnownRows({"x": x}, [y]), **options)
    publish(targets_net(), name="bare", **options)
    np.savez(folder / "rows.npz", x=X, y=Y)
    np.savez(folder / "far.npz", x=FAR)
    for place in range(3):
        known = KnownRows({"x": x}, [y[:, place]])
        publish(targets_net([place]), name=f"alone-{place}", holdout=known, **options)
        np.savez(folder / f"rows-{place}.npz", x=X, y=Y[:, place])
    return folder


@pytest.fixture(scope="module")
def together(desk) -> Artifact:
    return Artifact(desk / "artifacts" / "together" / "1")


def calibration_of(artifact: Artifact) -> OutputCalibration:
    assert artifact.manifest.calibration is not None
    [found] = artifact.manifest.calibration.outputs.values()
    return found


def distance(mean: np.ndarray, std: float) -> np.ndarray:
    """E|X| of normals."""
    return mean * (1 - 2 * norm.cdf(-mean / std)) + 2 * std * norm.pdf(mean / std)


def test_each_number_s_figures_are_those_of_the_signatures(judged, together):
    found = judged("together", "rows.npz")["outputs"]
    assert list(found) == NAMES
    off = together.answer("serving_default", X)["mean"].astype(np.float64)
    served = {name: values.astype(np.float64) for name, values in together.answer("mc_predict", X).items()}
    every = together.draws(X, DRAWS).astype(np.float64)
    fit = calibration_of(together).fit
    assert isinstance(fit, TargetNoises)
    for place, name in enumerate(NAMES):
        y, draws, std = Y[:, place], every[..., place], fit.targets[place].std
        assert std is not None
        figures = found[name]["answers"]
        assert (list(figures), found[name]["task"]) == (["deterministic", "mc", "mc_calibrated"], "regression")
        deterministic, mc, calibrated = figures.values()
        assert deterministic["rmse"] == pytest.approx(root_mean_squared_error(y, off[:, place]), rel=1e-5)
        assert deterministic["crps"] == pytest.approx(np.abs(y - off[:, place]).mean(), rel=1e-5)
        for one in (mc, calibrated):
            assert one["rmse"] == pytest.approx(root_mean_squared_error(y, draws.mean(axis=1)), rel=1e-5)
        apart = draws[:, :, None] - draws[:, None]
        near = np.abs(draws - y[:, None])
        assert mc["crps"] == pytest.approx(np.mean(near.mean(axis=1) - np.abs(apart).mean(axis=(1, 2)) / 2), rel=1e-5)
        error = distance(draws - y[:, None], std).mean(axis=1)
        between = distance(apart, np.sqrt(2) * std).mean(axis=(1, 2))
        assert calibrated["crps"] == pytest.approx(np.mean(error - between / 2), rel=1e-5)
        logs = logsumexp(norm.logpdf(y[:, None], draws, std), axis=1) - np.log(DRAWS)
        assert calibrated["nll"] == pytest.approx(-logs.mean(), rel=1e-5)
        pit = norm.cdf((y[:, None] - draws) / std).mean(axis=1)
        assert calibrated["pit_distance"] == pytest.approx(kstest(pit, "uniform").statistic, abs=1e-5)
        assert calibrated["pit_histogram"] == np.histogram(pit, 10, (0, 1))[0].tolist()
        for kind, spread in ((mc, "epistemic_std"), (calibrated, "std")):
            wanted = np.sqrt(np.square(served[spread][:, place]).mean())
            assert kind["sharpness"] == pytest.approx(wanted, rel=1e-5)
            lower, upper = kind["intervals"]["rmse"]
            assert lower < kind["rmse"] < upper


def test_the_noises_differ_so_that_no_number_is_taken_for_another(judged):
    found = judged("together", "rows.npz")["outputs"]
    rmse = [found[name]["answers"]["mc"]["rmse"] for name in NAMES]
    assert all(max(pair) / min(pair) > 1.5 for pair in pairwise(sorted(rmse)))


def test_coverage_is_each_number_s_own_interval_s(judged, together):
    served = together.answer("mc_predict", X)
    lower, upper = served["interval_lower"], served["interval_upper"]
    found = judged("together", "rows.npz")["outputs"]
    for place, name in enumerate(NAMES):
        inside = (lower[:, place] <= Y[:, place]) & (Y[:, place] <= upper[:, place])
        by_coverage = {one["wanted"]: one for one in found[name]["coverage"]}
        assert list(by_coverage) == [0.8, 0.9, 0.95]
        assert by_coverage[0.9]["found"] == pytest.approx(inside.mean())
        assert by_coverage[0.9]["lower"] < inside.mean() < by_coverage[0.9]["upper"]
        assert by_coverage[0.9]["size"] == pytest.approx((upper - lower)[:, place].mean(), rel=1e-4)
        assert found[name]["abstention"] is None


def test_a_number_is_judged_as_a_network_for_it_alone(judged):
    together = judged("together", "rows.npz", "--outliers", "far.npz")["outputs"]
    for place, name in enumerate(NAMES):
        alone = judged(f"alone-{place}", f"rows-{place}.npz", "--outliers", "far.npz")
        for key in ("answers", "differences"):
            assert flat(together[name][key]) == pytest.approx(flat(alone[key]), rel=2e-3, abs=2e-4), key
        # A threshold is kept in steps, and the sums of another kernel are rounded otherwise.
        for own, other in zip(together[name]["coverage"], alone["coverage"], strict=True):
            assert own == pytest.approx(other, rel=2e-3, abs=1.1 / ROWS)
        assert together[name]["outliers"].keys() == alone["outliers"].keys() >= {"far.npz"}
        assert flat(together[name]["outliers"]) == pytest.approx(flat(alone["outliers"]), abs=2e-2)


def flat(values: object, path: str = "") -> dict[str, float]:
    """The numbers of a document by their places in it, without histograms."""
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key != "pit_histogram"}
        return {name: one for key, value in values.items() for name, one in flat(value, f"{path}/{key}").items()}
    if isinstance(values, list):
        return {name: one for at, value in enumerate(values) for name, one in flat(value, f"{path}/{at}").items()}
    return {path: values} if isinstance(values, int | float) else {}


def test_outliers_are_told_by_each_number_s_own_deviation(judged, together):
    found = judged("together", "rows.npz", "--outliers", "far.npz")["outputs"]
    own, strange = (together.answer("mc_predict", rows) for rows in (X, FAR))
    for place, name in enumerate(NAMES):
        scores = np.concatenate([values["epistemic_std"][:, place] for values in (own, strange)])
        wanted = roc_auc_score(np.repeat([0, 1], [ROWS, 50]), scores)
        assert found[name]["outliers"]["far.npz"]["epistemic_std"]["auroc"] == pytest.approx(wanted, abs=1e-3)
        wanted = roc_auc_score(np.repeat([0, 1], [ROWS, 50]), np.concatenate([own["novelty"], strange["novelty"]]))
        assert found[name]["outliers"]["far.npz"]["novelty"]["auroc"] == pytest.approx(wanted, abs=1e-3)


def test_without_calibration_there_are_the_draws_alone(judged, desk):
    found = judged("bare", "rows.npz")["outputs"]
    bare = Artifact(desk / "artifacts" / "bare" / "1")
    for place, name in enumerate(NAMES):
        assert list(found[name]["answers"]) == ["deterministic", "mc"]
        wanted = root_mean_squared_error(Y[:, place], bare.answer("mc_predict", X)["mean"][:, place])
        assert found[name]["answers"]["mc"]["rmse"] == pytest.approx(wanted, rel=1e-5)
        assert found[name]["coverage"] == []
        assert any(note.startswith("not calibrated: it was packaged without") for note in found[name]["notes"])


def test_what_calibration_said_of_one_number_is_said_of_it_alone():
    known = OutputCalibration(warnings=["no abstention", "number 1: nothing is gained", "number 10: nothing is lost"])
    found = [calibration_of_number(known, number) for number in (0, 1, 10)]
    assert [one.warnings for one in found if one is not None] == [
        ["no abstention"],
        ["no abstention", "nothing is gained"],
        ["no abstention", "nothing is lost"],
    ]


def test_people_see_a_title_and_tables_of_each_number(command):
    code, output, error = command("together", "rows.npz")
    assert code == 0, error
    titles = [line for line in output.splitlines() if line.startswith("together 1, output ")]
    assert [title.split(" on ")[0].partition(", output ")[2] for title in titles] == NAMES
    assert output.count("coverage asked") == 3
    assert output.count("\n\ntogether 1, output ") == 2
    # What was said of one number at packaging stands beside its own figures.
    assert "- number " not in output
    assert output.count("- no abstention: a row has several numbers (shape [3])") == 3


@pytest.mark.parametrize(
    ("y", "named"),
    [
        (Y[:, 0], ["y: shape (120,) found", "(120, 3) wanted"]),
        (Y[:, :2], ["y: shape (120, 2) found", "(120, 3) wanted"]),
        (Y[:, :, None, None], ["y: shape (120, 3, 1, 1) found", "(120, 3) wanted"]),
    ],
)
def test_answers_of_another_shape_are_one_line_and_exit_code_2(desk, command, y, named):
    np.savez(desk / "odd.npz", x=X, y=y)
    code, output, error = command("together", "odd.npz")
    assert (code, output) == (2, "")
    [line] = error.splitlines()
    assert all(text in line for text in named)


def test_rows_of_one_answer_each_are_refused_in_one_line(desk):
    """A file has one column of answers."""
    held = HeldOut("rows.csv", "all 120 rows", {"x": X}, [Y[:, 0]])
    folder = desk / "artifacts" / "together" / "1"
    with pytest.raises(CannotJudge) as refused:
        assess(Answering(folder, read_manifest(folder)), held)
    assert str(refused.value) == (
        "together: output 'targets' answers with [3] numbers a row; wanted an .npz file whose y has all of them"
    )


def test_two_outputs_of_which_one_has_several_numbers(desk, judged):
    shared = inputs = keras.Input((4,), name="x")
    shared = keras.layers.Dropout(0.5)(shared)
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(shared)
    size = keras.layers.Dense(2, name="size")(shared)
    model = scatter(keras.Model(inputs, {"kind": kind, "size": size}))
    x, random = rows_of(200, 0)[0], np.random.default_rng(3)
    sizes = np.asarray(model(x, training=False)["size"]) + random.normal(size=(200, 2)) * [0.1, 2.0]
    kinds = random.integers(0, 3, 200)
    rows = KnownRows({"x": x}, [kinds, sizes])
    artifact = Artifact(publish(model, name="both", repository=desk / "artifacts", holdout=rows))
    assert [output.name for output in artifact.manifest.outputs] == ["kind", "size"]
    np.savez(desk / "both.npz", x=x, y_kind=kinds, y_size=sizes)
    found = judged("both", "both.npz")["outputs"]
    assert list(found) == ["kind", "size[0]", "size[1]"]
    served = artifact.answer("mc_predict", x)
    p = artifact.answer("serving_default", x)["kind_probabilities"].astype(np.float64)
    wanted = log_loss(kinds, p / p.sum(axis=1, keepdims=True))
    assert found["kind"]["answers"]["deterministic"]["nll"] == pytest.approx(wanted, rel=1e-5)
    for place in range(2):
        own = found[f"size[{place}]"]
        wanted = root_mean_squared_error(sizes[:, place], served["size_mean"][:, place])
        assert own["answers"]["mc_calibrated"]["rmse"] == pytest.approx(wanted, rel=1e-5)
        ends = [served[f"size_interval_{end}"][:, place] for end in ("lower", "upper")]
        inside = (ends[0] <= sizes[:, place]) & (sizes[:, place] <= ends[1])
        assert {one["wanted"]: one["found"] for one in own["coverage"]}[0.9] == pytest.approx(inside.mean())


def axes_net(shape: tuple[int | None, ...], units: int) -> keras.Model:
    """A regression of `units` numbers for each place of a row, whose last axis is 4 values."""
    inputs = keras.Input((*shape, 4), name="x")
    return scatter(keras.Model(inputs, keras.layers.Dense(units, name="grid")(keras.layers.Dropout(0.4)(inputs))))


def grid_case(tmp_path: Path, shape: tuple[int | None, ...], units: int, sizes: tuple[int, ...]):
    """What is judged of a network without calibration, its artifact, x, y and how a script sees it."""
    folder = publish(axes_net(shape, units), name="grid", repository=tmp_path, num_samples=DRAWS)
    random = np.random.default_rng(0)
    x = random.normal(size=(30, *sizes, 4)).astype(np.float32)
    y = random.normal(size=(30, *sizes, units) if units > 1 else (30, *sizes))
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    manifest = read_manifest(folder)
    held = held_out.read(str(tmp_path / "rows.npz"), manifest)
    found = assess(Answering(folder, manifest), held)
    return found, Artifact(folder), x, y, assessment_summary.document(manifest, held, found)


def test_numbers_along_several_axes_are_named_by_their_places(tmp_path):
    found, artifact, x, y, document = grid_case(tmp_path, (3,), 2, (3,))
    places = list(np.ndindex(3, 2))
    assert [one.output.name for one in found] == [f"grid[{row}, {column}]" for row, column in places]
    assert list(document["outputs"]) == [one.output.name for one in found]
    served = artifact.answer("mc_predict", x)
    for one, (row, column) in zip(found, places, strict=True):
        wanted = root_mean_squared_error(y[:, row, column], served["mean"][:, row, column])
        assert one.figures["mc"]["rmse"] == pytest.approx(wanted, rel=1e-5)
        assert not any("left out" in note for note in one.notes)


@pytest.mark.parametrize("shape", [(5,), (None,)], ids=["fixed", "free"])
def test_of_many_numbers_the_first_ones_are_judged_and_it_is_said(tmp_path, shape):
    found, artifact, x, y, document = grid_case(tmp_path, shape, 7, (5,))
    places = list(np.ndindex(5, 7))[:MOST]
    assert [one.output.name for one in found] == [f"grid[{row}, {column}]" for row, column in places]
    served, draws = artifact.answer("mc_predict", x), artifact.draws(x, DRAWS)
    for one, (row, column) in zip(found, places, strict=True):
        truth = y[:, row, column]
        wanted = root_mean_squared_error(truth, served["mean"][:, row, column])
        assert one.figures["mc"]["rmse"] == pytest.approx(wanted, rel=1e-5)
        own = draws[:, :, row, column].astype(np.float64)
        pairs = np.abs(own[:, :, None] - own[:, None]).mean(axis=(1, 2))
        crps = np.mean(np.abs(own - truth[:, None]).mean(axis=1) - pairs / 2)
        assert one.figures["mc"]["crps"] == pytest.approx(crps, rel=1e-5)
        said = "of the 35 numbers of a row the first 16 are judged: 19 are left out"
        assert said in document["outputs"][one.output.name]["notes"]


def test_rows_of_another_length_are_no_outliers_by_their_deviation(tmp_path):
    folder = publish(axes_net((None,), 1), name="grid", repository=tmp_path, num_samples=DRAWS)
    random = np.random.default_rng(0)
    held = HeldOut("rows", "", {"x": random.normal(size=(30, 5, 4)).astype(np.float32)}, [np.zeros((30, 5))])
    named = {name: {"x": np.ones((20, size, 4), np.float32)} for name, size in (("same", 5), ("longer", 7))}
    found = assess(Answering(folder, read_manifest(folder)), held, named)
    assert [one.output.name for one in found] == [f"grid[{place}]" for place in range(5)]
    assert all("epistemic_std" in one.outliers["same"] for one in found)
    assert all("epistemic_std" not in one.outliers["longer"] for one in found)


def test_answers_for_other_places_than_the_network_s_are_refused(tmp_path):
    folder = publish(axes_net((None,), 1), name="grid", repository=tmp_path, num_samples=DRAWS)
    held = HeldOut("rows", "", {"x": np.zeros((30, 5, 4), np.float32)}, [np.zeros((30, 6))])
    with pytest.raises(PlacesError, match=r"output 'grid': shape \(30, 6\) found, \(30, 5\) wanted"):
        assess(Answering(folder, read_manifest(folder)), held)


def test_members_of_an_ensemble_are_judged_by_each_number(tmp_path):
    nets = []
    for number in range(2):
        inputs = keras.Input((4,))
        hidden = keras.layers.Dropout(0.3, name="drop")(keras.layers.Dense(8, activation="tanh")(inputs))
        answer = keras.layers.Dense(3)(hidden)
        nets.append(scatter(keras.Model(inputs, answer, name=f"member_{number + 1}"), seed=number))
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, keras.layers.Average(name="targets")([net(inputs) for net in nets]))
    x, y = rows_of(200, 0)
    rows = KnownRows({"x": x}, [y])
    folder = publish(model, name="pair", repository=tmp_path, num_samples=DRAWS, members=2, holdout=rows)
    held = HeldOut("rows", "", {"x": X}, [Y])
    found = assess(Answering(folder, read_manifest(folder)), held)
    assert [one.output.name for one in found] == NAMES
    draws = Artifact(folder).draws(X, 2 * DRAWS).astype(np.float64)
    for place, one in enumerate(found):
        assert {kind: len(each) for kind, each in one.members.items()} == {"deterministic": 2, "mc": 2}
        for number, net in enumerate(nets):
            off = np.asarray(net(X, training=False))[:, place]
            assert one.members["deterministic"][number]["rmse"] == pytest.approx(
                root_mean_squared_error(Y[:, place], off), rel=1e-5
            )
            own = draws[:, number::2, place]
            assert one.members["mc"][number]["rmse"] == pytest.approx(
                root_mean_squared_error(Y[:, place], own.mean(axis=1)), rel=1e-5
            )
