"""What the report of a model says is what its artifact answers."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from models import contract
from tests.training.pages import read_page
from training import summary
from training.comparison import Variant
from training.datasets import load
from training.model_report import Drawn, Evidence, learning_curves, loss_limits, overfitting, plain_words, shown
from training.pipeline import train
from training.plan import plan
from training.progress import Reporter
from training.recipes import SONAR
from training.splits import split

TITLES = ["In plain words", "Results", "Learning curves", ..., "The least and the most certain rows"]
TITLES += ["How the answer settles", "Can the uncertainty be trusted?", "Does it notice what it has never seen?"]
TITLES += ["Data and settings"]


def published(name, repository, **request):
    request = {"seed": 0, "num_samples": 50, "epochs": 6} | request
    made = train(plan(name, repository=repository, **request), Reporter(quiet=True))
    page = read_page((made.folder / contract.REPORT_FILE).read_text(encoding="utf-8"))
    data = load(name)
    test = split(data.y, data.task).test
    signature = tf.saved_model.load(str(made.folder)).signatures
    served = {key: value.numpy() for key, value in signature["mc_predict"](**tensors(data, test)).items()}
    return made, page, data, test, served


def tensors(data, rows):
    return {name: tf.constant(values) for name, values in data.tensors(rows).items()}


@pytest.fixture(scope="module")
def sonar(tmp_path_factory):
    return published("sonar", tmp_path_factory.mktemp("sonar"), compare=True)


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory):
    return published("diabetes", tmp_path_factory.mktemp("diabetes"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return published("digits", tmp_path_factory.mktemp("digits"), epochs=2)


@pytest.mark.parametrize("case", ["sonar", "diabetes", "digits"])
def test_every_artifact_has_its_report_among_its_sealed_files(case, request):
    made, page, data, _, _ = request.getfixturevalue(case)
    assert contract.REPORT_FILE in contract.verify(made.folder).files
    middle = "Residuals" if data.task == "regression" else "Confusion matrix"
    assert page.headings == [f"{case}: how far to trust it", *(middle if title is ... else title for title in TITLES)]
    assert not page.references


def test_results_are_the_figures_of_every_network(sonar):
    made, page, _, test, _ = sonar
    table = page.tables[0]
    assert table[0] == ["dropout in", "visible", "hidden", "in the test", "accuracy", "nll", "brier"]
    assert [row[0] for row in table[1:]] == [
        "visible and hidden",
        "visible and hidden",
        "baseline",
        "visible",
        "hidden",
        "(a constant answer)",
    ]
    figures = [made.variants[0].metrics, made.mc_metrics, *(variant.metrics for variant in made.variants[1:])]
    for row, metrics in zip(table[1:], [*figures, made.constant_metrics], strict=True):
        share = metrics["accuracy"]
        more = (share * len(test) + 2) / (len(test) + 4)
        error = np.sqrt(more * (1 - more) / (len(test) + 4))
        assert row[4:] == [
            f"{100 * share:.1f} ± {100 * error:.1f} %",
            f"{metrics['nll']:.3g}",
            f"{metrics['brier']:.3g}",
        ]


def test_confusion_matrix_counts_the_served_answers(sonar):
    _, page, data, test, served = sonar
    named = served["probabilities"].argmax(axis=1)
    expected = [int(((data.y[test] == true) & (named == answer)).sum()) for true in (0, 1) for answer in (0, 1)]
    matrix = page.figures[1]
    assert [int(text) for text in matrix if text.isdigit()] == expected
    assert {"mine", "rock", "named", "true"} <= set(matrix)


def test_least_and_most_certain_rows_are_those_of_the_served_entropies(sonar):
    _, page, data, test, served = sonar
    entropy = served["predictive_entropy"]
    order = np.argsort(entropy, kind="stable")
    least, most = page.tables[1], page.tables[2]
    for table, rows in ((least, order[::-1][:5]), (most, order[:5])):
        assert [row[0] for row in table[1:]] == [str(test[number] + 1) for number in rows]
        assert [row[4] for row in table[1:]] == [f"{entropy[number]:.3f}" for number in rows]
        for cells, number in zip(table[1:], rows, strict=True):
            answer = data.labels[served["probabilities"][number].argmax()]
            assert cells[1] == data.labels[data.y[test[number]]]
            assert cells[2] == (answer if answer == cells[1] else f"{answer} (wrong)")


def test_the_answer_s_standard_error_is_that_of_the_served_draws(sonar):
    made, page, _, test, served = sonar
    [text] = [text for text in page.paragraphs if text.startswith("An answer is a mean over draws")]
    order = np.argsort(served["predictive_entropy"], kind="stable")
    chosen = test[[order[0], order[len(order) // 2], order[-1]]]
    signature = tf.saved_model.load(str(made.folder)).signatures["mc_draws"]
    draws = signature(**tensors(load("sonar"), chosen), num_samples=tf.constant(50), seed=tf.constant(0, tf.int64))
    error = draws["draws"].numpy().astype(np.float64).std(axis=1, ddof=1).max() / np.sqrt(50)
    assert f"the standard error is {error:.2g} at most for the three rows" in text
    assert f"{served['standard_error'].max():.2g} at most for the 42 test rows" in text


def test_plain_words_say_how_often_it_is_right_and_whether_its_doubt_helps(sonar, diabetes):
    made, page, data, test, served = sonar
    words = page.paragraphs[1]
    assert f"gets {100 * made.variants[0].metrics['accuracy']:.0f} % right" in words
    assert f"always naming the commonest class gets {100 * made.constant_metrics['accuracy']:.0f} %" in words
    right = served["probabilities"].argmax(axis=1) == data.y[test]
    order = np.argsort(served["predictive_entropy"], kind="stable")
    high, low = right[order[:21]].mean(), right[order[-21:]].mean()
    assert f"most certain, {100 * high:.0f} % are right; in the other half, {100 * low:.0f} %." in words
    made, page, *_ = diabetes
    assert f"off by {made.variants[0].metrics['mae']:.3g} on average" in page.paragraphs[1]
    assert f"({made.constant_metrics['rmse']:.3g})" in page.paragraphs[1]


def test_learning_curves_are_of_every_network_and_both_kinds_of_rows(sonar):
    made, page, *_ = sonar
    assert {"visible and hidden", "baseline", "visible", "hidden"} <= set(page.figures[0])
    assert {"training rows, dropout on", "held-out rows, dropout off", "epoch", "loss"} <= set(page.figures[0])
    assert all(len(variant.losses) == len(variant.held_out_losses) == 6 for variant in made.variants)
    svg = (made.folder / contract.REPORT_FILE).read_text(encoding="utf-8").split("<figure>")[1]
    # Six points a curve, two curves a network.
    curves = [path for path in re.findall(r'<path d="(M[^"]+)" clip-path', svg) if path.count("L") == 5]
    assert len(curves) == 8


def test_data_and_settings_are_those_of_the_manifest(diabetes):
    made, page, data, *_ = diabetes
    facts = {row[0]: row[1] for table in page.tables[-3:-1] for row in table[1:]}
    described = made.manifest.training_data
    assert facts["SHA-256 of the data"] == described.sha256
    assert facts["of them to train / calibrate / test"] == "266 / 88 / 88"
    assert (facts["epochs"], facts["training seed"], facts["draws"]) == ("6", "0", "50")
    assert [row[0] for row in page.tables[-1][1:]] == list(data.columns)
    age = made.manifest.inputs[0].features[0]
    assert page.tables[-1][1] == ["age", "numeric", f"{age.minimum:g} to {age.maximum:g} years"]


def test_images_are_shown(digits):
    made, page, *_ = digits
    html = (made.folder / contract.REPORT_FILE).read_text(encoding="utf-8")
    # Ten rows of the data, and the shades of the confusion matrix.
    assert html.count("data:image/png;base64,") == 11
    assert page.tables[-1][0][0] == "training"


def evidence(data, **more):
    count = len(data.y)
    values = {
        "name": data.name,
        "data": data,
        "rows": SimpleNamespace(test=np.arange(count)),
        "variants": [Variant("hidden", SONAR, None, [1.0, 0.9], [1.0, 0.9], {"accuracy": 0.9, "mae": 1, "rmse": 1})],
        "constant_metrics": {"accuracy": 0.5, "mae": 1, "rmse": 1},
        "training_data": SimpleNamespace(train_rows=100),
    }
    return Evidence(**(values | {"num_samples": 50, "seed": 0, "training_seed": 0} | more))


@pytest.mark.parametrize(
    ("certain", "uncertain", "said"),
    [
        # By Fisher's exact test 0.12, 0.006, 0.00004 and 1.
        ((57, 0), (53, 4), "no difference that so few rows could show"),
        ((57, 0), (49, 8), "worth listening to"),
        ((40, 17), (56, 1), "points the wrong way"),
        ((1, 0), (0, 1), "no difference that so few rows could show"),
    ],
)
def test_doubt_is_called_worth_something_only_where_the_rows_show_it(certain, uncertain, said):
    right = np.repeat([True, False, True, False], [*certain, *uncertain])
    data = replace(load("breast_cancer"), y=np.zeros(len(right), np.int64))
    probabilities = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
    outputs = {"probabilities": probabilities, "predictive_entropy": np.arange(len(right)) / len(right)}
    assert said in plain_words(evidence(data), Drawn(np.arange(len(right)), outputs, np.zeros((3, 3)), [0]))


def test_of_a_regression_s_two_test_rows_nothing_is_claimed():
    data = replace(load("diabetes"), y=np.array([0, 1], np.float32))
    outputs = {"mean": np.array([0.1, 0.3]), "epistemic_std": np.array([0.1, 0.2])}
    words = plain_words(evidence(data), Drawn(np.arange(2), outputs, np.zeros((3, 3)), [0]))
    assert "no difference that so few rows could show" in words


def test_accuracies_of_all_or_no_rows_have_errors():
    assert summary.figures({"accuracy": 1.0, "nll": 0.1}, 2) == ["1.000 ± 0.192", "0.1"]
    assert shown({"accuracy": 0.0}, 42) == ["0.0 ± 3.0 %"]


@pytest.mark.parametrize(
    ("losses", "limits"),
    [
        ([1.0, 0.5], (0, 1.1 * 0.995)),
        ([0.3, -0.2], (-0.2 - 0.0495, 0.295 + 0.0495)),
        ([-0.1, -0.3], (-0.3 - 0.0198, -0.102 + 0.0198)),
        ([np.inf, 1.0, np.nan], (0, 1.1)),
        ([np.nan], None),
        ([0.0, 0.0], None),
    ],
)
def test_all_losses_are_on_the_axis_whatever_their_sign(losses, limits):
    assert loss_limits(losses) == (limits and pytest.approx(limits))


def test_the_loss_of_a_net_that_learns_its_noise_is_named():
    data = replace(load("diabetes"), y=np.array([0, 1], np.float32))
    losses = [0.2, -0.1]
    noisy = Variant("hidden", replace(SONAR, heteroscedastic=True), None, losses, losses, {})
    [figure] = learning_curves(evidence(data, variants=[noisy])).figures
    assert "beta-NLL" in figure.caption
    [figure] = learning_curves(evidence(data)).figures
    assert "beta-NLL" not in figure.caption


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([1.0, 0.8, 0.6, 0.5], "had not risen"),
        ([1.0, 0.5, 0.4, 0.9], r"lowest around epoch 3 of 4 \(0.4\) and 0.9 at the end"),
        # One lucky epoch among many is no minimum.
        ([0.5] * 50 + [0.45] + [0.5] * 49, "had not risen"),
        ([1.0, 0.2, *np.linspace(0.2, 2, 98)], "trained for too long"),
        ([np.inf, 0.2, 0.1], "was no number in some epochs"),
    ],
)
def test_held_out_curve_is_read_as_a_person_would(curve, said):
    variant = Variant("visible", SONAR, None, [0.0], list(curve), {})
    assert re.search(said, overfitting(replace(variant)))
