"""Replicas against Keras, one net at a time, given the same initial weights, batches and masks."""

import math
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from training import replicas
from training.convolutions import convolutions
from training.recipes import Recipe
from training.replicas import NotStackable, Replica, Rows, Trained, train_stack

SGD = Recipe(
    architecture="dense",
    hidden_units=(7, 5),
    visible_dropout=0.0,
    hidden_dropout=0.0,
    max_norm=None,
    optimizer="sgd",
    learning_rate=0.05,
    momentum=0.9,
    epochs=5,
    batch_size=8,
)
ADAM = replace(SGD, optimizer="adam", learning_rate=0.02)
# As many hidden units as a few steps of dropout leave alive.
ALIVE = replace(ADAM, architecture="convolutional", hidden_units=(20,), learning_rate=0.001)
CNN_SGD = replace(SGD, architecture="convolutional", hidden_units=(6,), epochs=3)
CNN_ADAM = replace(CNN_SGD, optimizer="adam", learning_rate=0.005)


def table(head, outputs=1, groups=2):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(groups, 50, 6)).astype(np.float32)
    signal = x[0, :, 0] + 0.5 * x[0, :, 1] + 0.3 * generator.normal(size=50)
    y = {
        "sigmoid": signal > 0,
        "softmax": np.digitize(signal, [-0.5, 0.5]),
        "linear": signal,
    }[head].astype(np.float32)
    return Rows(x, np.tile(y, (groups, 1)), head, outputs)


def images(shape, head="softmax", outputs=3):
    """Blots of which some pixels are equal, as in digits: ties within a square that is pooled."""
    generator = np.random.default_rng(4)
    x = generator.integers(0, 3, size=(2, 50, *shape)) / 2
    signal = x[0, :, 1:4, 1:4].mean(axis=(1, 2, 3)) - x[0, :, 4:7, 1:4].mean(axis=(1, 2, 3))
    y = {"softmax": np.digitize(signal, [-0.1, 0.1]), "sigmoid": signal > 0}[head]
    flat = x.reshape(2, 50, -1).astype(np.float32)
    return Rows(flat, np.tile(y.astype(np.float32), (2, 1)), head, outputs, image=shape)


def sites(rows, recipe):
    """Shapes of the activations that dropout may stand behind: the inputs and every layer but the last."""
    shapes: list[tuple[int, ...]] = []
    height, width, channels = rows.image or (0, 0, 0)
    if recipe.architecture == "convolutional":
        shapes.append((height, width, channels))
        while len(shapes) == 1 or min(height, width) > 8:
            height, width = height // 2, width // 2
            shapes.append((height, width, 32 if len(shapes) == 1 else 64))
    return [*(shapes or [(rows.x.shape[-1],)]), *((units,) for units in recipe.hidden_units)]


class Batches(keras.utils.PyDataset):
    """The batches and masks of one replica, epoch by epoch, as `Replica`'s seed gives them."""

    def __init__(self, rows, replica):
        super().__init__()
        self.x, self.y = rows.x[replica.group], rows.y[replica.group]
        self.replica, self.epoch = replica, 0
        self.sites = sites(rows, replica.recipe)

    def __len__(self):
        return math.ceil(len(self.replica.train_rows) / self.replica.recipe.batch_size)

    def __getitem__(self, at):
        recipe, count = self.replica.recipe, len(self.replica.train_rows)
        seeds = tf.constant([self.replica.seed], tf.uint32)
        order = replicas.orders(seeds, tf.constant(self.epoch), tf.constant([count]), count)[0].numpy()
        chosen = self.replica.train_rows[order[at * recipe.batch_size : (at + 1) * recipe.batch_size]]
        step = tf.constant([self.epoch * len(self) + at])
        masks = []
        for site, shape in enumerate(self.sites):
            rate = recipe.hidden_dropout if site else recipe.visible_dropout
            bits = replicas.mask_bits(seeds, site, step, recipe.batch_size, math.prod(shape))[0].numpy()[: len(chosen)]
            mask = np.where(bits >= np.round(rate * 65536), 1 / (1 - rate), 0).astype(np.float32)
            masks.append(mask.reshape(-1, *shape))
        return (self.x[chosen].reshape(-1, *self.sites[0]), *masks), self.y[chosen]


def keras_alone(rows, replica, weights, patience=None):
    """Keras's own fit of one net, its dropout replaced by a product with given masks."""
    recipe = replica.recipe
    bound = None if recipe.max_norm is None else keras.constraints.MaxNorm(recipe.max_norm)
    shapes = sites(rows, recipe)
    inputs = keras.Input(shapes[0])
    masks = [keras.Input(shape) for shape in shapes]
    hidden = inputs * masks[0]
    for shape, mask in zip(shapes[1:], masks[1:], strict=True):
        if len(shape) == 3:
            maps = keras.layers.Conv2D(shape[-1], 3, padding="same", activation="relu")(hidden)
            hidden = keras.layers.MaxPooling2D(2)(maps) * mask
        else:
            hidden = hidden if len(hidden.shape) == 2 else keras.layers.Flatten()(hidden)
            hidden = keras.layers.Dense(shape[0], activation="relu", kernel_constraint=bound)(hidden) * mask
    hidden = hidden if len(hidden.shape) == 2 else keras.layers.Flatten()(hidden)
    activation = None if rows.head == "linear" else rows.head
    model = keras.Model([inputs, *masks], keras.layers.Dense(rows.outputs, activation=activation)(hidden))
    model.set_weights(weights)
    optimizer = (
        keras.optimizers.SGD(recipe.learning_rate, momentum=recipe.momentum)
        if recipe.optimizer == "sgd"
        else keras.optimizers.Adam(recipe.learning_rate)
    )
    loss = {
        "sigmoid": "binary_crossentropy",
        "softmax": "sparse_categorical_crossentropy",
        "linear": "mean_squared_error",
    }[rows.head]
    model.compile(optimizer=optimizer, loss=loss)
    batches = Batches(rows, replica)
    # Not `on_epoch_end`: Keras also calls that once before the first epoch.
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: setattr(batches, "epoch", epoch))]
    watch = {}
    if patience is not None:
        x, y = (values[replica.group][replica.stop_rows] for values in (rows.x, rows.y))
        x = x.reshape(-1, *shapes[0])
        ones = [np.ones((len(x), *shape), np.float32) for shape in shapes]
        callbacks.append(keras.callbacks.EarlyStopping(patience=patience, restore_best_weights=True))
        watch = {"validation_data": ((x, *ones), y)}
    history = model.fit(batches, epochs=recipe.epochs, shuffle=False, verbose=0, callbacks=callbacks, **watch)
    return model.get_weights(), history.history["loss"]


def assert_as_keras_alone(rows, stack, patience=None, block_epochs=25):
    widths = (*(math.prod(shape) for shape in sites(rows, stack[0].recipe)), rows.outputs)
    is_image = stack[0].recipe.architecture == "convolutional"
    layers = convolutions(rows.image) if is_image else ()
    start = replicas.initial_weights(widths, [one.seed + 100 for one in stack], layers)
    trained = train_stack(rows, stack, weights=start, patience=patience, block_epochs=block_epochs)
    for number, replica in enumerate(stack):
        alone = Trained(rows, tuple(stack), start, np.zeros(0, np.float32), np.zeros(0, np.int64)).keras_weights(number)
        watched = patience if replica.stop_rows is not None else None
        weights, losses = keras_alone(rows, replica, alone, watched)
        for ours, theirs in zip(trained.keras_weights(number), weights, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert trained.epochs[number] == len(losses)
        np.testing.assert_allclose(trained.losses[number, : len(losses)], losses, atol=1e-4)
        assert np.isnan(trained.losses[number, len(losses) :]).all()
        assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(weights, alone, strict=True))
    return trained


ROWS = np.random.default_rng(0).permutation(50)


@pytest.mark.parametrize(
    "changes",
    [
        [{}, {"learning_rate": 0.2}, {"momentum": 0.0}],
        [{"visible_dropout": 0.2, "hidden_dropout": 0.5}, {"visible_dropout": 0.3}, {"hidden_dropout": 0.1}],
        [{"hidden_dropout": 0.3, "max_norm": 0.8, "epochs": 3}, {"max_norm": 1.5, "momentum": 0.2}, {}],
    ],
    ids=lambda changes: "+".join(sorted({key for one in changes for key in one})),
)
@pytest.mark.parametrize("base", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_stack_is_each_net_trained_alone(base, changes):
    stack = [
        # 33 rows leave a batch of one, 40 none that is not full, 41 one step more: every replica has its own count.
        Replica(replace(base, **one), train_rows=ROWS[: (33, 40, 41)[number]], group=number % 2, seed=number + 5)
        for number, one in enumerate(changes)
    ]
    assert_as_keras_alone(table("sigmoid"), stack, block_epochs=4)


@pytest.mark.parametrize(("base", "head", "outputs"), [(SGD, "softmax", 3), (ADAM, "linear", 1)])
def test_other_heads_are_trained_as_keras_does(base, head, outputs):
    chosen = replace(base, hidden_dropout=0.2, visible_dropout=0.1, learning_rate=0.02)
    stack = [Replica(chosen, ROWS[:30], group=0, seed=1), Replica(chosen, ROWS[10:45], group=1, seed=2)]
    assert_as_keras_alone(table(head, outputs), stack)


def test_early_stopping_is_keras_s_for_each_replica_by_itself():
    chosen = replace(SGD, epochs=20, learning_rate=0.3, hidden_dropout=0.2)
    stack = [
        Replica(replace(chosen, learning_rate=rate), ROWS[:30], seed=seed, stop_rows=stop)
        for seed, (rate, stop) in enumerate([(0.3, ROWS[30:40]), (0.02, ROWS[32:50]), (0.3, ROWS[35:]), (0.3, None)])
    ]
    trained = assert_as_keras_alone(table("sigmoid"), stack, patience=3, block_epochs=7)
    assert len(set(trained.epochs.tolist())) > 1
    assert trained.epochs[3] == 20


@pytest.mark.parametrize(
    ("shape", "head", "outputs"),
    [((8, 8, 1), "softmax", 3), ((9, 11, 3), "sigmoid", 1), ((18, 19, 2), "softmax", 3)],
    ids=["one convolution", "odd sides and colours", "two convolutions"],
)
@pytest.mark.parametrize("base", [CNN_SGD, CNN_ADAM], ids=["sgd", "adam"])
def test_a_stack_of_convolutional_nets_is_each_net_trained_alone(base, shape, head, outputs):
    changes = [
        {"visible_dropout": 0.2, "hidden_dropout": 0.5},
        {"learning_rate": base.learning_rate / 2, "max_norm": 0.8, "epochs": 2},
        {"hidden_dropout": 0.3, "momentum": 0.5, "max_norm": 1.5},
    ]
    stack = [
        Replica(replace(base, **one), train_rows=ROWS[: (33, 40, 41)[number]], group=number % 2, seed=number + 5)
        for number, one in enumerate(changes)
    ]
    assert_as_keras_alone(images(shape, head, outputs), stack, block_epochs=2)


def test_convolutional_nets_are_stopped_early_as_keras_does():
    chosen = replace(CNN_SGD, epochs=12, hidden_dropout=0.2)
    stack = [
        Replica(replace(chosen, learning_rate=rate), ROWS[:30], seed=seed, stop_rows=stop)
        for seed, (rate, stop) in enumerate([(0.2, ROWS[30:40]), (0.01, ROWS[32:50]), (0.1, None)])
    ]
    trained = assert_as_keras_alone(images((8, 8, 1)), stack, patience=2, block_epochs=5)
    assert len(set(trained.epochs.tolist())) > 1
    assert trained.epochs[2] == 12


def test_a_convolutional_net_without_hidden_layers():
    chosen = replace(CNN_SGD, hidden_units=(), visible_dropout=0.2, max_norm=1.0)
    assert_as_keras_alone(images((8, 8, 1)), [Replica(chosen, ROWS[:30], seed=1), Replica(chosen, ROWS[5:], seed=2)])


def test_a_net_without_hidden_layers():
    chosen = replace(SGD, hidden_units=(), visible_dropout=0.2)
    assert_as_keras_alone(table("sigmoid"), [Replica(chosen, ROWS[:30], seed=1), Replica(chosen, ROWS[5:], seed=2)])


def test_a_replica_does_not_depend_on_what_is_trained_beside_it():
    rows = table("sigmoid")
    one = Replica(replace(SGD, hidden_dropout=0.3), ROWS[:30], seed=4)
    others = [
        Replica(replace(SGD, visible_dropout=0.4, epochs=9, max_norm=1.0), ROWS, group=1, seed=seed) for seed in (8, 9)
    ]
    alone, beside = train_stack(rows, [one]), train_stack(rows, [*others, one])
    for left, right in zip(alone.keras_weights(0), beside.keras_weights(2), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    answers = alone.draws([ROWS[:5]], 4)[0], beside.draws([ROWS[:2], ROWS[:9], ROWS[:5]], 4)[2]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_orders_are_permutations_that_change_with_epoch_and_seed():
    seeds, counts = tf.constant([1, 2], tf.uint32), tf.constant([30, 20])
    first, second = (replicas.orders(seeds, tf.constant(epoch), counts, 32).numpy() for epoch in (0, 1))
    for order in (first, second):
        assert sorted(order[0, :30]) == list(range(30))
        assert sorted(order[1, :20]) == list(range(20))
    assert (first[0] != second[0]).any()
    assert (first[0, :20] != first[1, :20]).any()


def test_every_row_comes_first_equally_often():
    epochs = [
        replicas.orders(tf.constant([7], tf.uint32), tf.constant(e), tf.constant([5]), 8)[0, 0] for e in range(500)
    ]
    # Five standard deviations of a binomial share of 1/5.
    np.testing.assert_allclose(np.bincount(epochs, minlength=5) / 500, 0.2, atol=5 * np.sqrt(0.16 / 500))


def test_masks_drop_at_their_rate_and_independently():
    bits = replicas.mask_bits(tf.cast(tf.range(40), tf.uint32), 1, tf.range(40), 50, 30).numpy().reshape(-1, 30)
    dropped = bits < 0.3 * 65536
    np.testing.assert_allclose(dropped.mean(axis=0), 0.3, atol=5 * np.sqrt(0.21 / len(dropped)))
    correlation = np.corrcoef(dropped.T) - np.eye(30)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(dropped))
    assert np.abs(np.corrcoef(dropped[:-1, 0], dropped[1:, 0])[0, 1]) < 5 / np.sqrt(len(dropped))


def test_predictions_are_the_keras_net_s_own():
    rows = table("softmax", 3)
    trained = train_stack(rows, [Replica(replace(SGD, hidden_dropout=0.2), ROWS[:30], seed=seed) for seed in (1, 2)])
    model = keras.Sequential(
        [keras.Input([6]), *[keras.layers.Dense(n, "relu") for n in (7, 5)], keras.layers.Dense(3, "softmax")]
    )
    for number, answer in enumerate(trained.predict([ROWS[30:], ROWS[40:]])):
        model.set_weights(trained.keras_weights(number))
        expected = model(rows.x[0][(ROWS[30:], ROWS[40:])[number]])
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def convolutional_model(recipe, rate):
    layers = [keras.Input((18, 19, 2)), keras.layers.Dropout(recipe.visible_dropout)]
    for filters in (32, 64):
        layers += [keras.layers.Conv2D(filters, 3, padding="same", activation="relu"), keras.layers.MaxPooling2D(2)]
        layers.append(keras.layers.Dropout(rate))
    layers += [keras.layers.Flatten(), keras.layers.Dense(20, "relu"), keras.layers.Dropout(rate)]
    return keras.Sequential([*layers, keras.layers.Dense(3, "softmax")])


def test_answers_and_losses_of_a_convolutional_stack_are_the_keras_nets_own(monkeypatch):
    # So little that rows and draws are answered in pieces.
    monkeypatch.setattr(replicas, "PREDICT_FLOATS", 2 * 3 * 18 * 19 * 32)
    rows, chosen = images((18, 19, 2)), replace(ALIVE, hidden_dropout=0.3, visible_dropout=0.1)
    trained = train_stack(rows, [Replica(chosen, ROWS[:30], group=seed % 2, seed=seed) for seed in (1, 2)])
    model = convolutional_model(chosen, 0.3)
    own = [ROWS[30:], ROWS[41:]]
    answers, losses, draws = trained.predict(own), trained.loss(own), trained.draws(own, 5)
    few = trained.draws([ROWS[30:32], ROWS[41:42]], 2)
    for number in range(2):
        model.set_weights(trained.keras_weights(number))
        group = trained.replicas[number].group
        expected = np.array(model(rows.x[group][own[number]].reshape(-1, 18, 19, 2)))
        np.testing.assert_allclose(answers[number], expected, atol=1e-5)
        y = rows.y[group][own[number]].astype(int)
        assert losses[number] == pytest.approx(-np.log(expected[np.arange(len(y)), y]).mean(), abs=1e-4)
        np.testing.assert_allclose(draws[number][:2, : len(few[number][0])], few[number], atol=1e-6)
        assert draws[number].std(axis=0).min() > 0


def test_draws_of_a_convolutional_stack_have_the_moments_of_keras_s_dropout():
    rows, chosen = images((18, 19, 2)), replace(ALIVE, hidden_dropout=0.3, visible_dropout=0.2)
    trained = train_stack(rows, [Replica(chosen, ROWS[:30], seed=1)])
    [draws] = trained.draws([ROWS[30:32]], 3000)
    model = convolutional_model(chosen, 0.3)
    model.set_weights(trained.keras_weights(0))
    keras.utils.set_random_seed(0)
    many = np.repeat(rows.x[0][ROWS[30:32]].reshape(-1, 18, 19, 2), 3000, axis=0)
    expected = np.array(model(many, training=True)).reshape(2, 3000, 3)
    error = 5 * np.sqrt(2 * expected.var(axis=1) / 3000)
    assert (np.abs(draws.mean(axis=0) - expected.mean(axis=1)) < error).all()
    np.testing.assert_allclose(draws.std(axis=0), expected.std(axis=1), rtol=0.1)


def test_draws_have_the_moments_of_keras_s_dropout():
    """10,000 draws of a row, against as many of Keras's own Dropout."""
    rows = table("sigmoid")
    chosen = replace(SGD, hidden_dropout=0.3, visible_dropout=0.2)
    trained = train_stack(rows, [Replica(chosen, ROWS[:30], seed=1)])
    [draws] = trained.draws([ROWS[30:33]], 10_000)
    layers = [keras.Input([6]), keras.layers.Dropout(0.2)]
    for units in (7, 5):
        layers += [keras.layers.Dense(units, "relu"), keras.layers.Dropout(0.3)]
    model = keras.Sequential([*layers, keras.layers.Dense(1, "sigmoid")])
    model.set_weights(trained.keras_weights(0))
    keras.utils.set_random_seed(0)
    many = np.repeat(rows.x[0][ROWS[30:33]], 10_000, axis=0)
    expected = np.array(model(many, training=True)).reshape(3, 10_000)
    error = 5 * np.sqrt(2 * expected.var(axis=1) / 10_000)
    assert (np.abs(draws[..., 0].mean(axis=0) - expected.mean(axis=1)) < error).all()
    np.testing.assert_allclose(draws[..., 0].std(axis=0), expected.std(axis=1), rtol=0.05)


def test_a_draw_does_not_depend_on_how_many_are_asked():
    rows = table("sigmoid")
    trained = train_stack(rows, [Replica(replace(SGD, hidden_dropout=0.3), ROWS[:30], seed=1)])
    few, many = trained.draws([ROWS], 5)[0], trained.draws([ROWS], 50)[0]
    np.testing.assert_allclose(few, many[:5], atol=1e-6)
    assert many.std(axis=0).min() > 0


def test_unlike_nets_are_refused():
    stack = [Replica(SGD, ROWS), Replica(replace(SGD, hidden_units=(3,)), ROWS)]
    with pytest.raises(NotStackable, match="2 kinds of networks"):
        train_stack(table("sigmoid"), stack)
    with pytest.raises(NotStackable, match="rows that are no images"):
        train_stack(table("sigmoid"), [Replica(CNN_SGD, ROWS)])


def test_threefry_is_the_published_one():
    """The known answers of the authors' Random123 distribution, kat_vectors, threefry2x32 20 rounds."""
    from training.threefry import threefry

    vectors = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, expected in vectors:
        words = threefry(*[tuple(tf.constant(word, tf.uint32) for word in pair) for pair in (key, counter)])
        assert tuple(int(word) for word in words) == expected
