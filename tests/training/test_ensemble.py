from dataclasses import replace

import keras
import numpy as np
import pytest

from dropserve import main
from models.contract import verify
from tests.models.artifacts import Artifact
from tests.training.passengers import namesakes
from training import inventory, replicas, summary
from training.datasets import load
from training.ensemble import fit_members, turns
from training.fit import fit
from training.pipeline import train
from training.plan import EnsembleError, plan
from training.progress import Reporter
from training.recipes import recipe, recipe_of
from training.splits import split

EPOCHS = 3


def answers(model, data, rows):
    return keras.ops.convert_to_numpy(model(data.network_input(rows), training=False))


def members_of(model):
    return [layer for layer in model.layers if layer.name.startswith("member_")]


def weights(model):
    return [weight for layer in model.layers for weight in layer.get_weights()]


def fitted(name, members, **options):
    data = load(name)
    rows = split(data.y, data.task)
    chosen = recipe(name, epochs=EPOCHS)
    return data, rows, chosen, fit_members(data, rows.train, chosen, members, watch=rows.calibration, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("digits", {"most_encoded_bytes": 0}), ("sonar", {"most_encoded_bytes": 0})],
)
def test_members_trained_one_after_another_are_the_nets_of_their_seeds(name, options):
    seen = []
    data, rows, chosen, ensemble = fitted(
        name, 2, seed=2**32 - 1, on_epoch=lambda epoch, loss: seen.append(epoch), **options
    )
    assert seen == list(range(1, 2 * EPOCHS + 1))
    alone = [fit(data, rows.train, chosen, seed=seed, watch=rows.calibration) for seed in (2**32 - 1, 0)]
    for member, one in zip(members_of(ensemble.model), alone, strict=True):
        for own, expected in zip(weights(member), weights(one.model), strict=True):
            np.testing.assert_array_equal(own, expected)
    mean = np.mean([answers(one.model, data, rows.test) for one in alone], axis=0)
    np.testing.assert_allclose(answers(ensemble.model, data, rows.test), mean, atol=1e-6)
    np.testing.assert_allclose(ensemble.losses, np.mean([one.losses for one in alone], axis=0))
    np.testing.assert_allclose(ensemble.watched_losses, np.mean([one.watched_losses for one in alone], axis=0))


@pytest.mark.parametrize("name", ["sonar", "wine", "diabetes", "digits"])
def test_member_of_a_stack_does_not_depend_on_how_many_there_are(name):
    seen = []
    data, rows, _, five = fitted(name, 5, seed=3, on_epoch=lambda epoch, loss: seen.append(epoch))
    *_, two = fitted(name, 2, seed=3)
    assert seen == list(range(1, EPOCHS + 1))
    assert len(five.losses) == len(five.watched_losses) == EPOCHS
    kernels = []
    for number, member in enumerate(members_of(five.model)):
        kernels.append(weights(member)[0].tobytes())
        if number < 2:
            for own, other in zip(weights(member), weights(members_of(two.model)[number]), strict=True):
                np.testing.assert_allclose(own, other, atol=1e-5)
    assert len(set(kernels)) == 5
    mean = np.mean([answers(net, data, rows.test) for net in members_on_raw_rows(five.model)], axis=0)
    np.testing.assert_allclose(answers(five.model, data, rows.test), mean, rtol=1e-5)


def test_members_in_several_stacks_are_those_of_one(monkeypatch):
    *_, three = fitted("digits", 3, seed=3)
    monkeypatch.setattr(replicas, "CONVOLUTIONAL_STACK", 2)
    seen = []
    data, _, chosen, again = fitted("digits", 3, seed=3, on_epoch=lambda epoch, loss: seen.append(epoch))
    assert seen == list(range(1, turns(data, chosen, 3) * EPOCHS + 1)) == list(range(1, 2 * EPOCHS + 1))
    for one, other in zip(members_of(three.model), members_of(again.model), strict=True):
        for own, expected in zip(weights(one), weights(other), strict=True):
            np.testing.assert_allclose(own, expected, atol=1e-5)
    np.testing.assert_allclose(three.losses, again.losses, atol=1e-5)
    np.testing.assert_allclose(three.watched_losses, again.watched_losses, atol=1e-5)


@pytest.mark.parametrize("heteroscedastic", [False, True])
def test_members_of_a_table_whose_columns_are_called_as_layers_are(heteroscedastic):
    data, rows = namesakes(), np.arange(40)
    chosen = replace(recipe_of(data), visible_dropout=0.1, epochs=EPOCHS, heteroscedastic=heteroscedastic)
    ensemble = fit_members(data, rows, chosen, 2, seed=0, most_encoded_bytes=0).model
    alone = [fit(data, rows, chosen, seed=seed).model for seed in (0, 1)]
    mean = np.mean([answers(model, data, rows) for model in alone], axis=0)
    np.testing.assert_allclose(answers(ensemble, data, rows), mean, rtol=1e-5)


def members_on_raw_rows(model):
    return [keras.Model(model.input, symbol) for symbol in model.output._keras_history.operation.input]


def test_regression_members_answer_in_the_targets_unit():
    data, rows, _, ensemble = fitted("diabetes", 3, seed=0)
    y = data.y[rows.train]
    for net in members_on_raw_rows(ensemble.model):
        assert abs(answers(net, data, rows.train).mean() - y.mean()) < y.std()


def test_table_whose_columns_are_called_as_layers_are_is_published(tmp_path):
    header = "product,product_category,output,visible_dropout,member_1,worth"
    random = np.random.default_rng(0)
    rows = [f"{random.choice(list('ab'))},{random.choice(list('cd'))},{n % 7},{n % 5},{n},{n * 0.5}" for n in range(60)]
    (tmp_path / "goods.csv").write_text("\n".join([header, *rows]))
    for members in (None, 2):
        result = published(
            tmp_path / "goods.csv", tmp_path / "artifacts", target="worth", ensemble=members, visible_dropout=0.1
        )
        assert [item.name for item in verify(result.folder).inputs] == header.split(",")[:-1]


def published(data, repository, **request):
    request = {"seed": 0, "num_samples": 20, "epochs": EPOCHS, "ensemble": 3} | request
    return train(plan(str(data), repository=repository, **request), Reporter(quiet=True))


def test_ensemble_is_published_and_said_to_be_one(tmp_path):
    result = published("sonar", tmp_path)
    manifest = verify(result.folder)
    assert manifest.members == manifest.training["members"] == summary.document(result)["members"] == 3
    assert "An ensemble of 3 networks" in summary.sentences(result)
    assert "These 3 networks" in (result.folder / "report.html").read_text()
    [item] = inventory.read(tmp_path)
    assert inventory.document(item)["members"] == 3
    assert inventory.table([item]).columns[2]._cells == ["in each of 3 members:\n3 Dropout 0.2"]

    data = load("sonar")
    rows = split(data.y, data.task).test
    artifact = Artifact(result.folder)
    plain = answers(keras.models.load_model(result.folder / "model.keras"), data, rows)
    np.testing.assert_array_equal(artifact.answer("serving_default", data.x[rows])["probabilities"][:, 1:], plain)
    again = answers(keras.models.load_model(result.folder / "model.h5"), data, rows)
    np.testing.assert_array_equal(again, plain)


def test_table_with_text_and_missing_values_can_be_an_ensemble(tmp_path):
    random = np.random.default_rng(1)
    lines = ["age,town,returns"]
    for number in range(120):
        age = "" if number % 9 == 0 else int(random.integers(18, 80))
        lines.append(f"{age},{random.choice(['Ulm', 'Rome', 'Oslo'])},{random.choice(['yes', 'no'])}")
    (tmp_path / "guests.csv").write_text("\n".join(lines))
    result = published(tmp_path / "guests.csv", tmp_path / "artifacts", target="returns")
    artifact = Artifact(result.folder)
    rows = {"age": np.array([33, np.nan], np.float32), "town": np.array(["Ulm", "Paris"])}
    assert artifact.draws(rows, 7).shape == (2, 7, 2)
    assert np.isfinite(artifact.sample(rows, 7)["probabilities"]).all()


@pytest.mark.parametrize("members", [-1, 0, 1, 51, 1000])
def test_number_of_members_that_makes_no_ensemble_is_refused(members, tmp_path):
    with pytest.raises(EnsembleError, match=f"--ensemble {members}: wanted 2 to 50 members"):
        plan("sonar", repository=tmp_path, seed=0, num_samples=20, ensemble=members)


@pytest.mark.parametrize("command", ["train", "tune"])
@pytest.mark.parametrize("members", ["1", "many"])
def test_command_line_refuses_in_one_line(command, members, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["dropserve", command, "sonar", "--ensemble", members, "--repository", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--ensemble" in line
    assert not any(tmp_path.iterdir())
