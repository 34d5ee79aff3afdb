"""A Keras model split at its first stochastic layers: a deterministic prefix, run once, and a suffix, run each draw.

Functional and Sequential models are walked node by node, nested ones included, so that everything that no noise
reaches belongs to the prefix. Subclassed models have no graph to split: their whole call is the suffix.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from models.contract import ArtifactError, Precision, StochasticLayer
from models.dense import dense, keras_mask
from models.folding import Fold, folds_of
from models.members import member_symbols, share_streams
from models.merging import Merged, Site, sites_of
from models.padding import Padded, padded_layers
from models.stochastic import Draws, attach, drawing, has_drawn, is_elementwise, walk

# A tensor's place: the chain of nested-model calls that leads to it, and its symbolic tensor there.
_Place = tuple[tuple[int, ...], int]


class _Value(NamedTuple):
    tensor: tf.Tensor
    # [rows * draws, ...] instead of [rows, ...].
    folded: bool


def _graph_of(layer: Any) -> Any | None:
    """The layer's graph of nodes, where it has one: itself if functional, its functional twin if Sequential."""
    if isinstance(layer, keras.Sequential):
        return getattr(layer, "_functional", None)
    # A subclass that only reuses the functional constructor may override call(): then its graph is not its definition.
    functional = keras.src.models.functional.Functional
    if isinstance(layer, functional) and type(layer).call is functional.call:
        return layer
    return None


def names_scope() -> Any:
    """Of operations' and variables' names, as below a Keras model: layers may be called `_hidden`, and TensorFlow saves
    no `_hidden/kernel` but below another name.
    """
    return tf.name_scope("network")


def _mask_place(place: _Place) -> _Place:
    """Where the Keras sequence mask of the tensor at `place` is kept. Nested calls are numbered from 0."""
    return (*place[0], -1), place[1]


class Network:
    """A private copy of a Keras model whose stochastic layers draw by (seed, layer, draw)."""

    def __init__(self, model: keras.Model, precision: Precision = "float32", members: int = 1) -> None:
        """precision: of the suffix; the layers that make the outputs stay in their own.

        members: of an ensemble, see `models.members`.
        """
        self.model = model
        self.precision = precision
        self.stochastic_layers: list[StochasticLayer] = attach(model)
        # The members' answers; none where the network is no ensemble.
        self._members = [] if members == 1 else member_symbols(model, members)
        if self._members:
            self.stochastic_layers = share_streams(model, self._members, self.stochastic_layers)
        self._graph = _graph_of(model)
        self._drawn: dict[int, bool] = {}
        self._inputs_structure = self._graph._inputs_struct if self._graph is not None else None
        graphs = {} if self._graph is None else _graphs_below(self._graph)
        _refuse_unfit_masks(graphs.values())
        folds = folds_of(list(graphs.values()))
        # By the id of the folded layer's node, and of its normalization's.
        self.folds: dict[int, Fold] = {id(fold.node): fold for fold in folds}
        self._absorbed: dict[int, Fold] = {id(fold.norm_node): fold for fold in folds}
        self.padded = self._padded_layers(graphs)
        self._holds_folds = _holders(graphs, {id(fold.node) for fold in folds})
        if self._graph is not None:
            self._refuse_certain_outputs()
        elif precision != "float32":
            raise ArtifactError(
                f"model {model.name!r}: precision {precision} needs a graph of layers, and a subclassed model has "
                "none; package it with float32"
            )

    @property
    def is_split(self) -> bool:
        """Whether the network has a graph that the prefix split could use (subclassed models have none)."""
        return self._graph is not None

    @property
    def is_half_precision(self) -> bool:
        """Whether some layer computes in 16 bits."""
        return self.precision != "float32" or any("16" in layer.compute_dtype for _, layer in walk(self.model))

    def deterministic(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The network in inference mode, exactly Keras's `model(x, training=False)`; inputs and outputs flat."""
        outputs = self.model(self._pack(inputs), training=False)
        return keras.tree.flatten(outputs)

    def prefix(self, inputs: Sequence[tf.Tensor]) -> dict[_Place, tf.Tensor]:
        """Everything that no noise reaches, by place. For a subclassed model: its inputs."""
        if self._graph is None:
            return {((), number): tensor for number, tensor in enumerate(inputs)}
        walk = _Walk(self, {}, None)
        with names_scope():
            walk.run(self._graph, (), [_Value(tensor, False) for tensor in inputs])
        found = {place: value.tensor for place, value in walk.values.items() if place not in walk.turned}
        masks = {_mask_place(place): keras_mask(tensor) for place, tensor in found.items()}
        return found | {place: mask for place, mask in masks.items() if mask is not None}

    @property
    def members(self) -> int:
        return len(self._members) or 1

    def suffix(
        self,
        prefix: dict[_Place, tf.Tensor],
        draws: Draws,
        member: int = 0,
        merged: Merged | None = None,
    ) -> tuple[list[tf.Tensor], set[_Place]]:
        """Run the stochastic part, of an ensemble that of one member.

        merged: the kernel that holds masks, of just these draws.
        Returns the flat outputs, each [rows * draws, ...], and the places it read.
        """
        with drawing(draws), self._in_precision(), names_scope():
            if self._graph is None:
                folded = [fold(tensor, draws.num_draws) for tensor in prefix.values()]
                outputs = self.model(self._pack(folded), training=False)
                return keras.tree.flatten(outputs), set(prefix)
            for place, tensor in prefix.items():
                # A tensor that comes as a function's argument has lost its mask.
                if _mask_place(place) in prefix:
                    tensor._keras_mask = prefix[_mask_place(place)]
            walk = _Walk(self, {place: _Value(tensor, False) for place, tensor in prefix.items()}, draws)
            walk.skipped = {id(symbol) for number, symbol in enumerate(self._members) if number != member}
            if merged is not None:
                site = merged.site
                walk.merged = {id(site.before): None, id(site.behind): None, id(site.dense): merged}
            inputs = [walk.values.get(((), id(symbol))) for symbol in self._graph.inputs]
            outputs = walk.run(self._graph, (), inputs)
            if self._members:
                place = (), id(self._members[member])
                outputs = [(place, walk.values[place])]
            return [walk.folded(place, value) for place, value in outputs], walk.read

    @contextlib.contextmanager
    def _in_precision(self) -> Iterator[None]:
        """While the suffix is traced its layers compute in `precision`; their variables stay as they are."""
        if self.precision == "float32":
            yield
            return
        last = _last_layers(self._members or self.model.outputs)
        layers = [layer for _, layer in walk(self.model) if layer not in last]
        policies = [layer.dtype_policy for layer in layers]
        try:
            for layer in layers:
                layer.dtype_policy = f"mixed_{self.precision}"
            yield
        finally:
            for layer, policy in zip(layers, policies, strict=True):
                layer.dtype_policy = policy

    def widest_suffix(self) -> tuple[int, ...] | None:
        """Shape of one row of the widest activation in the suffix.

        None for a subclassed model, which does not say.
        """
        if self._graph is None:
            return None
        reached = self._reached(self._graph, [False] * len(self._graph.inputs))
        return widest(reached.drawn)

    def holds_noise(self, operation: Any) -> bool:
        """Whether noise is drawn in the operation or below it."""
        key = id(operation)
        if key not in self._drawn:
            self._drawn[key] = has_drawn(operation)
        return self._drawn[key]

    def merge_sites(self) -> list[Site]:
        """Where kept masks can be merged into the kernel that they meet. Members of an ensemble have their own."""
        if self._graph is None or self._members or self.precision != "float32":
            return []
        drawn = self._drawn_symbols()
        sites = sites_of(_nodes(self._graph), self._graph.outputs, self._exact(self._absorbed))
        return [site for site in sites if id(site.before.input_tensors[0]) not in drawn]

    def _padded_layers(self, graphs: Mapping[int, Any]) -> dict[int, Padded]:
        if self._graph is None or self.precision != "float32":
            return {}
        return padded_layers(
            [(_nodes(graph), graph.outputs) for graph in graphs.values()],
            self._drawn_symbols(),
            self._exact(self.folds),
            self._exact(self._absorbed),
        )

    @staticmethod
    def _exact(folds: Mapping[int, Fold]) -> dict[int, Fold]:
        return {key: fold for key, fold in folds.items() if fold.is_exact}

    def _drawn_symbols(self) -> set[int]:
        graph = self._graph
        return set() if graph is None else {id(s) for s in self._reached(graph, [False] * len(graph.inputs)).drawn}

    def kernel_and_bias(self, node: Any) -> tuple[tf.Variable, tf.Variable | None]:
        """Of a Dense layer, as the draws take it."""
        own = self.padded.get(id(node)) or self._exact(self.folds).get(id(node))
        if own is not None:
            return own.kernel, own.bias
        return node.operation.kernel.value, node.operation.bias.value if node.operation.use_bias else None

    def own_variables(self) -> list[tf.Variable]:
        """Those that stand beside the Keras model's."""
        layers: list[Fold | Padded] = [*self.folds.values(), *self.padded.values()]
        return [variable for layer in layers for variable in (layer.kernel, layer.bias) if variable is not None]

    def is_entered(self, operation: Any) -> bool:
        """Whether a nested model is walked node by node: where noise is drawn below it, or a layer is folded."""
        return self.holds_noise(operation) or id(_graph_of(operation)) in self._holds_folds

    def shortcut(self, node: Any, x: tf.Tensor) -> tf.Tensor | None:
        """The output of a folded layer, or of the normalization that it has absorbed; None for any other node."""
        fold = self.folds.get(id(node))
        if fold is not None and fold.is_exact:
            return fold(x)
        absorbed = self._absorbed.get(id(node))
        return x if absorbed is not None and absorbed.is_exact else None

    def _pack(self, flat: Sequence[tf.Tensor]) -> Any:
        if self._inputs_structure is None:
            return flat[0] if len(flat) == 1 else list(flat)
        return keras.tree.pack_sequence_as(self._inputs_structure, list(flat))

    def _reached(self, graph: Any, inputs: list[bool]) -> _Reach:
        """Which outputs and which other tensors noise reaches, without running anything."""
        noisy = {id(symbol): flag for symbol, flag in zip(graph.inputs, inputs, strict=True)}
        drawn: list[Any] = []
        for node in _nodes(graph):
            flags = [noisy.get(id(symbol), False) for symbol in node.input_tensors]
            nested = _graph_of(node.operation)
            if nested is not None and self.holds_noise(node.operation):
                below = self._reached(nested, [noisy.get(id(symbol), False) for symbol, _ in _arguments(node, nested)])
                drawn += below.drawn
                results = below.outputs
            else:
                hit = any(flags) or self.holds_noise(node.operation)
                results = [hit] * len(node.outputs)
            for symbol, flag in zip(node.outputs, results, strict=True):
                noisy[id(symbol)] = flag
                if flag:
                    drawn.append(symbol)
        return _Reach([noisy.get(id(symbol), False) for symbol in graph.outputs], drawn)

    def _refuse_certain_outputs(self) -> None:
        reach = self._reached(self._graph, [False] * len(self.model.inputs))
        for name, noisy in zip(self.output_names(), reach.outputs, strict=True):
            if not noisy:
                raise ArtifactError(
                    f"output {name!r}: no active stochastic layer on its path; its uncertainty would be a false 0; "
                    "package a model without that output, or put dropout on its path"
                )

    def output_names(self) -> list[str]:
        """The outputs' names, flat: keys of a dict output, else the names of the layers that make them."""
        if self._graph is None:
            return list(getattr(self.model, "output_names", None) or ["output"])
        structure = self._graph._outputs_struct
        if isinstance(structure, dict):
            return ["_".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure)]
        names: list[str] = []
        for name in self._graph.output_names:
            # One layer may make several outputs: "lstm", "lstm_1", ...
            unique, number = name, 0
            while unique in names:
                number += 1
                unique = f"{name}_{number}"
            names.append(unique)
        return names


class _Reach(NamedTuple):
    outputs: list[bool]
    # Symbolic tensors that noise reaches.
    drawn: list[Any]


def widest(tensors: Iterable[Any]) -> tuple[int, ...]:
    """Shape of one row of the widest of these tensors, of a flat one where several are; free axes count as 256."""
    shapes = (tuple(size or 256 for size in tensor.shape[1:]) for tensor in tensors)
    return max(shapes, key=lambda shape: (math.prod(shape), -len(shape)), default=(256,))


def _nodes(graph: Any) -> list[Any]:
    """The graph's nodes from inputs to outputs."""
    by_depth = graph._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if node.operation is not None and not node.is_input
    ]


def _graphs_below(graph: Any) -> dict[int, Any]:
    """The graph and those of the models nested in it, each once, by id."""
    found = {id(graph): graph}
    for node in _nodes(graph):
        nested = _graph_of(node.operation)
        if nested is not None and id(nested) not in found:
            found |= _graphs_below(nested)
    return found


def _refuse_unfit_masks(graphs: Iterable[Any]) -> None:
    """Keras builds a Softmax behind a sequence mask, and runs it only where the mask fits the input's last axes."""
    for node in (node for graph in graphs for node in _nodes(graph)):
        symbol = node.input_tensors[0] if isinstance(node.operation, keras.layers.Softmax) else None
        mask = keras_mask(symbol)
        if symbol is None or mask is None:
            continue
        pairs = zip(mask.shape[:0:-1], symbol.shape[::-1], strict=False)
        if any(None not in (own, size) and own not in (1, size) for own, size in pairs):
            raise ArtifactError(
                f"layer {node.operation.name!r}: a sequence mask of shape {tuple(mask.shape)} falls on the last axes "
                f"of its input of shape {tuple(symbol.shape)}, which Keras does not run either; wanted Softmax before "
                "the mask, or as another layer's activation"
            )


def _holders(graphs: dict[int, Any], nodes: set[int]) -> set[int]:
    """Ids of the graphs that have one of these nodes, in themselves or in a model nested in them."""
    inside = {key: [(id(node), id(_graph_of(node.operation))) for node in _nodes(graphs[key])] for key in graphs}
    found: set[int] = set()
    while True:
        new = {key for key, pairs in inside.items() if any(own in nodes or below in found for own, below in pairs)}
        if new == found:
            return found
        found = new


def _last_layers(symbols: Sequence[Any]) -> list[Any]:
    """The layers that make these symbolic outputs, those inside nested models included."""
    layers = []
    for symbol in symbols:
        operation = symbol._keras_history.operation
        nested = _graph_of(operation)
        layers += [operation] if nested is None else _last_layers(nested.outputs)
    return layers


def fold(tensor: tf.Tensor, num_draws: tf.Tensor) -> tf.Tensor:
    """[rows, ...] -> [rows * draws, ...], row by row; Keras's sequence mask with it."""
    folded = tf.repeat(tensor, num_draws, axis=0)
    folded.set_shape([None, *tensor.shape[1:]])
    mask = keras_mask(tensor)
    if mask is not None:
        folded._keras_mask = tf.repeat(mask, num_draws, axis=0)
    return folded


class _Walk:
    """One pass through the graph: with `draws` the suffix, without them the prefix."""

    def __init__(self, network: Network, values: dict[_Place, _Value], draws: Draws | None) -> None:
        self._network = network
        self.values = values
        self._given = frozenset(values)
        self._draws = draws
        self._tiled: dict[_Place, tf.Tensor] = {}
        self.read: set[_Place] = set()
        # Places of the prefix whose tensors have the rows on another axis than the first: they cannot be folded.
        self.turned: set[_Place] = set()
        # Ids of the symbolic tensors that are not to be computed.
        self.skipped: set[int] = set()
        # By node: the layer whose kernel holds masks; None for the dropout that it makes up for.
        self.merged: dict[int, Merged | None] = {}

    def run(self, graph: Any, scope: tuple[int, ...], inputs: Sequence[_Value | None]) -> list[tuple[_Place, Any]]:
        """Compute what can be computed; returns (place, value) of the graph's outputs, value None where unknown."""
        for symbol, value in zip(graph.inputs, inputs, strict=True):
            if value is not None:
                self.values.setdefault((scope, id(symbol)), value)
        for number, node in enumerate(_nodes(graph)):
            places = [(scope, id(symbol)) for symbol in node.outputs]
            if all(place in self.values for place in places) or not self.skipped.isdisjoint(map(id, node.outputs)):
                continue
            known = all((scope, id(symbol)) in self.values for symbol in node.input_tensors)
            nested = _graph_of(node.operation)
            if nested is not None and self._network.is_entered(node.operation):
                results = self._nested(node, nested, (*scope, number), scope)
            elif known and (self._draws is not None or not self._network.holds_noise(node.operation)):
                results = self._call(node, scope)
            else:
                continue
            for place, result in zip(places, results, strict=True):
                if result is not None:
                    self.values[place] = result
        return [((scope, id(symbol)), self.values.get((scope, id(symbol)))) for symbol in graph.outputs]

    def folded(self, place: _Place, value: _Value) -> tf.Tensor:
        """The value as a folded tensor; a tensor of the prefix is tiled once."""
        if value.folded:
            return value.tensor
        self._note(place)
        if self._draws is None:
            raise RuntimeError("a prefix has no draws to fold")
        if place not in self._tiled:
            self._tiled[place] = fold(value.tensor, self._draws.num_draws)
        return self._tiled[place]

    def _note(self, place: _Place) -> None:
        self.read |= {place, _mask_place(place)} & self._given

    def _nested(self, node: Any, graph: Any, scope: tuple[int, ...], outer: tuple[int, ...]) -> list[_Value | None]:
        inputs = [
            self._handed_down((outer, id(symbol)), None if mask is None else (outer, id(mask)), wanted.dtype)
            for (symbol, mask), wanted in zip(_arguments(node, graph), graph.inputs, strict=True)
        ]
        return [value for _, value in self.run(graph, scope, inputs)]

    def _handed_down(self, place: _Place, mask_place: _Place | None, dtype: str) -> _Value | None:
        """The value at `place` as a nested model takes it: in its dtype, with the sequence mask that the call names."""
        value = self.values.get(place)
        if value is None:
            return None
        if self._draws is not None:
            self._note(place)
        mask = keras_mask(value.tensor)
        if mask_place is not None:
            named = self.values.get(mask_place)
            if named is None:
                return None
            mask = self.folded(mask_place, named) if value.folded else named.tensor
            if self._draws is not None:
                self._note(mask_place)
        if mask_place is None and value.tensor.dtype.name == dtype:
            return value
        tensor = tf.cast(value.tensor, dtype) if value.tensor.dtype.name != dtype else tf.identity(value.tensor)
        if mask is not None:
            tensor._keras_mask = mask
        return _Value(tensor, value.folded)

    def _call(self, node: Any, scope: tuple[int, ...]) -> list[_Value | None]:
        operation = node.operation
        places = [(scope, id(symbol)) for symbol in node.input_tensors]
        values = [self.values[place] for place in places]
        if values and self._network.holds_noise(operation) and not any(_has_rows(s) for s in node.input_tensors):
            shape = tuple(node.input_tensors[0].shape)
            found, wanted = (
                ("where the rows are not the first axis", "with the rows first: drop before they are moved")
                if None in shape
                else ("the same for every row", "with a rows' axis: drop after adding it to the rows")
            )
            raise ArtifactError(
                f"layer {operation.name!r}: its noise falls on a tensor of shape {shape}, {found}; wanted noise on "
                f"tensors {wanted}"
            )
        draws = self._draws
        if draws is None:
            shortcut = self._network.shortcut(node, values[0].tensor) if values else None
            results = _invoke(node, [value.tensor for value in values]) if shortcut is None else [shortcut]
            if any(_has_rows(s) or place in self.turned for s, place in zip(node.input_tensors, places, strict=True)):
                self.turned |= {(scope, id(symbol)) for symbol in node.outputs if not _has_rows(symbol)}
            return [_Value(result, False) for result in results]
        if id(node) in self.merged:
            self._note(places[0])
            merged = self.merged[id(node)]
            return [values[0] if merged is None else _Value(merged(values[0].tensor), True)]
        if is_elementwise(operation) and not values[0].folded:
            self._note(places[0])
            draws.unfolded = True
            (result,) = _invoke(node, [values[0].tensor])
            draws.unfolded = False
            mask = keras_mask(values[0].tensor)
            if mask is not None:
                result._keras_mask = tf.repeat(mask, draws.num_draws, axis=0)
            return [_Value(result, True)]
        tensors = []
        for symbol, place, value in zip(node.input_tensors, places, values, strict=True):
            # A tensor without a rows' axis (positions, constants) is the same for every row and every draw.
            if _has_rows(symbol):
                tensors.append(self.folded(place, value))
            else:
                self._note(place)
                tensors.append(value.tensor)
        width = tensors[0].shape[-1] if tensors and tensors[0].shape.rank == 2 else None
        padded = self._network.padded.get(id(node))
        # What carries a mask goes on as Keras has it.
        if padded is not None and width == padded.kernel.shape[0] and keras_mask(tensors[0]) is None:
            return [_Value(padded(tensors[0]), True)]
        shortcut = self._network.shortcut(node, tensors[0])
        if shortcut is not None:
            return [_Value(shortcut, True)]
        if is_elementwise(operation) and width is not None:
            with draws.padded(node.input_tensors[0].shape[-1], width):
                return [_Value(result, True) for result in _invoke(node, tensors)]
        if _is_single_unit(operation) and tensors[0].shape.rank == 2:
            return [_Value(_dot(operation, tensors[0]), True)]
        return [_Value(result, True) for result in _invoke(node, tensors)]


def _has_rows(symbol: Any) -> bool:
    return bool(symbol.shape) and symbol.shape[0] is None


def _arguments(node: Any, graph: Any) -> list[tuple[Any, Any | None]]:
    """A nested model's inputs in the order of its graph, each with the sequence mask that the call names for it.

    Raises ArtifactError where the call gives other inputs than the model has.
    """
    given = node.arguments.args[0] if node.arguments.args else node.arguments.kwargs["inputs"]
    wanted = keras.tree.flatten(graph._inputs_struct)
    if isinstance(given, dict) and not isinstance(graph._inputs_struct, dict):
        # Keras matches them by name: the dict's own order says nothing.
        inputs = [given[symbol.name] for symbol in wanted]
    else:
        inputs = keras.tree.flatten(given)
    if len(inputs) != len(wanted):
        raise ArtifactError(
            f"model {node.operation.name!r}: called with {len(inputs)} inputs, and it has {len(wanted)}; "
            "wanted a call with its own inputs and no others"
        )
    masks = keras.tree.flatten(node.arguments.kwargs.get("mask"))
    return list(zip(inputs, masks if len(masks) == len(inputs) else [None] * len(inputs), strict=True))


def _is_single_unit(operation: Any) -> bool:
    """Whether the layer is a plain Dense of one unit: a dot product, for which general matrix kernels are slow."""
    is_plain = type(operation) is keras.layers.Dense and operation.quantization_mode is None
    return is_plain and operation.units == 1 and operation.kernel.shape[-1] == 1


def _dot(layer: keras.layers.Dense, x: tf.Tensor) -> tf.Tensor:
    """A Dense of one unit in its own precision."""
    dtype = layer.compute_dtype
    bias = tf.cast(tf.convert_to_tensor(layer.bias), dtype) if layer.use_bias else None
    return dense(layer, tf.cast(x, dtype), tf.cast(tf.convert_to_tensor(layer.kernel), dtype), bias)


def _invoke(node: Any, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Call the node's operation in inference mode on these tensors, in the order of its symbolic arguments."""
    filled = {id(symbol): tensor for symbol, tensor in zip(node.input_tensors, tensors, strict=True)}
    args, kwargs = node.arguments.fill_in(filled)
    operation: Callable[..., Any] = node.operation
    if "training" in getattr(operation, "_call_context_args", {}):
        kwargs["training"] = False
    return keras.tree.flatten(operation(*args, **kwargs))
