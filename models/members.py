"""Deep ensembles: several networks of one architecture that take turns. Draw t is drawn by member t mod M.

In Keras it is one functional model: the members, nested models with dropout in them, and an Average of their answers.
Their stochastic layers share their random streams place by place: no two members ever draw the same t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from models.contract import ArtifactError, StochasticLayer
from models.stochastic import walk


def member_symbols(model: keras.Model, members: int) -> list[Any]:
    """The symbolic answers of the members, in order. Raises ArtifactError where the model is not such an ensemble."""
    outputs = getattr(model, "outputs", None) or []
    makers = [symbol._keras_history.operation for symbol in outputs]
    if len(outputs) == 1 and type(makers[0]) is keras.layers.Average:
        symbols = outputs[0]._keras_history.operation._inbound_nodes[-1].input_tensors
        own = [symbol._keras_history.operation for symbol in symbols]
        if len(set(map(id, own))) == members and all(isinstance(one, keras.Model) for one in own):
            return list(symbols)
    raise ArtifactError(
        f"model {model.name!r}: not an ensemble of {members} members; wanted a functional model whose output is the "
        f"Average of {members} different nested models"
    )


def share_streams(
    model: keras.Model, symbols: Sequence[Any], layers: Sequence[StochasticLayer]
) -> list[StochasticLayer]:
    """Number the stochastic layers of every member alike; returns the first member's, which stand for all.

    layers: as `stochastic.attach` found them. Raises ArtifactError where the members' layers differ.
    """
    names = [symbol._keras_history.operation.name for symbol in symbols]
    own = {name: [layer for layer in layers if layer.path.startswith(f"{name}/")] for name in names}
    if sum(map(len, own.values())) != len(layers):
        raise ArtifactError(f"model {model.name!r}: stochastic layers outside of its members; wanted all inside")
    by_path = dict(walk(model))
    described = [[(layer.path.partition("/")[2], layer.kind, layer.settings) for layer in own[name]] for name in names]
    for name, found in zip(names, described, strict=True):
        if found != described[0]:
            raise ArtifactError(f"model {model.name!r}: member {name!r} has other stochastic layers than {names[0]!r}")
        for index, layer in enumerate(own[name]):
            by_path[layer.path].draw_index = index
    return [layer.model_copy(update={"index": index}) for index, layer in enumerate(own[names[0]])]


def turns(first: tf.Tensor, count: tf.Tensor, member: int, members: int) -> tf.Tensor:
    """The draws of one member among draws first .. first + count - 1, counted from `first`: int32 [C], ascending.

    A member without any gets one of another's, which `interleave` leaves out: not every network takes no rows at all.
    """
    start = (member - first) % members
    own = tf.maximum((count - start + members - 1) // members, 1)
    return tf.minimum(start + members * tf.range(own), count - 1)


def interleave(parts: Sequence[tf.Tensor], first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """The members' draws [N, C_m, ...], each by its `turns`, in the order of the draws: [N, count, ...]."""
    sizes = tf.stack([tf.shape(part)[1] for part in parts])
    begins = tf.cumsum(sizes, exclusive=True)
    draws = tf.range(count)
    places = tf.gather(begins, (first + draws) % len(parts)) + draws // len(parts)
    return tf.gather(tf.concat(parts, axis=1), places, axis=1)
