"""The draw engine: T draws of a network in bounded memory, as TensorFlow functions ready for export.

The deterministic prefix runs once; the suffix runs on chunks of draws folded into the rows' axis; each chunk's moments
are merged into the running ones, so memory does not grow with T. Masks of the default seed's first draws are kept, and
equal the drawn ones bit for bit (unless they were asked to be balanced).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from models.contract import (
    DEFAULT_NUM_SAMPLES,
    DEFAULT_SEED,
    MIN_NUM_SAMPLES,
    NOVELTY,
    QUANTILE_DRAWS,
    ArtifactError,
    Masks,
    Task,
)
from models.exactness import operation_by_operation
from models.heads import Head, heads_of
from models.members import interleave, turns
from models.merging import MERGED_BYTES, MERGED_ROWS, Merged, merge_masks
from models.network import Network, widest
from models.novelty import Novelty, features
from models.statistics import MIN_QUANTILE_DRAWS, Moments, merge
from models.stochastic import Draws, Noise
from models.trials import free_size, made_up, wants_whole

# Floats of one activation of one chunk: it should stay in a core's caches.
CHUNK_FLOATS = 2**19
# A chunk of fewer folded rows would leave the matrix products inefficient, which pack their kernels anew for each ...
MIN_CHUNK_ROWS = 256
# ... and more so where a folded row is one row of the products, not one for each place of a sequence or a map ...
MIN_FLAT_CHUNK_ROWS = 1024
# ... unless so many make an activation larger than this, as large maps do.
MOST_CHUNK_FLOATS = 2**24
# Bytes of kept masks in an artifact at most.
KEPT_BYTES = 8 * 2**20
# ... and never more draws than this, unless the artifact's own default asks for more.
KEPT_DRAWS = 1000
# Draws before the first look at convergence, and the growth of the run between looks.
FIRST_LOOK = 32
LOOK_GROWTH = 1.5


class Form(NamedTuple):
    """A function of the inputs for a number of rows from `least` to `most`."""

    least: int
    most: int
    function: Callable[[Sequence[tf.Tensor]], dict[str, tf.Tensor]]


class Engine:
    """Draws of one network. All inputs are flat lists of tensors with rows first."""

    def __init__(
        self,
        network: Network,
        input_specs: Sequence[tf.TensorSpec],
        *,
        task: Task | None = None,
        labels: list[str] | None = None,
        unit: str | None = None,
        num_samples: int = DEFAULT_NUM_SAMPLES,
        seed: int = DEFAULT_SEED,
        masks: Masks = "independent",
        has_noise: bool = False,
    ) -> None:
        self.network = network
        self.input_specs = list(input_specs)
        self.num_samples = num_samples
        self.seed = seed
        self.masks = masks
        # Of the inputs' free axes, where it must be tried.
        self.free_size = free_size(network, self.input_specs)
        self.wants_whole = wants_whole(network, self.input_specs)
        self.heads: list[Head] = []
        # How far a row lies from known ones; None until they are known.
        self.novelty: Novelty | None = None
        self._plan(task, labels, unit, has_noise)
        self._keep_masks()
        self.merged = self._merge_masks()
        self._make_suffixes()
        self._any, self._chunked = self._paths()
        self._deterministic = operation_by_operation(network.deterministic, self.input_specs)

    # The four computations of the signatures, and the adaptive one.

    def calibrate(self, heads: list[Head]) -> None:
        """From now on the draws and their summaries are as these heads make them; the deterministic answer stays."""
        self.heads = heads
        self._make_suffixes()
        self._any, self._chunked = self._paths()

    def deterministic(self, inputs: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """Dropout off: the trained network's own answer."""
        answers: dict[str, tf.Tensor] = {}
        for head, tensor in zip(self.heads, self._deterministic(inputs), strict=True):
            answers = _joined(answers, head.point(tensor))
        return answers

    def default(self, inputs: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """The artifact's own number of draws and seed."""
        return self._sample(inputs, self.num_samples, self.seed)

    def forms(self) -> list[Form]:
        """`default` without its choices, for numbers of rows from 1 on; none where it has but one form.

        TensorFlow visits the operations of a choice and of all its branches at each call, a third of those of a small
        network: who calls from outside can choose for nothing.
        """
        most = self._folded_rows() // self.num_samples
        if most < 1 or not MIN_QUANTILE_DRAWS <= self.num_samples <= self.kept_draws:
            return []
        few = MERGED_ROWS - 1 if self.merged is not None and most >= MERGED_ROWS else most
        forms = [Form(1, few, lambda inputs: self._in_one_chunk(inputs, None))]
        if few < most:
            forms.append(Form(MERGED_ROWS, most, lambda inputs: self._in_one_chunk(inputs, self.merged)))
        return forms

    def _in_one_chunk(self, inputs: Sequence[tf.Tensor], merged: Merged | None) -> dict[str, tf.Tensor]:
        prefix = self._prefix(inputs)
        answers = self._kept_answers(prefix, self.num_samples, merged)
        return self._decided(dict(zip(self._names, answers, strict=True)), prefix)

    def sample(self, inputs: Sequence[tf.Tensor], num_samples: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        """Statistics of draws 0 .. num_samples - 1. num_samples int32 [], seed int64 []."""
        return self._sample(inputs, num_samples, seed)

    def draws(self, inputs: Sequence[tf.Tensor], num_samples: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        """Every draw's answer, [rows, draws, ...] for each output."""
        with tf.control_dependencies(_checks(num_samples)):
            num_samples = tf.identity(num_samples)
        prefix = self._prefix(inputs)
        step = self._chunk_size(_rows(prefix))

        begun = self._next_chunk(step, tf.constant(0), num_samples, seed)

        def body(done: tf.Tensor, *collected: tf.Tensor) -> tuple[tf.Tensor, ...]:
            count = self._next_chunk(step, done, num_samples - done, seed)
            new = self._quantities(prefix, done, count, seed)
            return (done + count, *[tf.concat([old, more], axis=1) for old, more in zip(collected, new, strict=True)])

        _, *collected = tf.while_loop(
            lambda done, *_: done < num_samples,
            body,
            [begun, *self._quantities(prefix, tf.constant(0), begun, seed)],
            shape_invariants=[
                tf.TensorShape([]),
                *[tf.TensorShape([None, None, *shape]) for shape in self._draw_shapes],
            ],
            parallel_iterations=1,
        )
        answers: dict[str, tf.Tensor] = {}
        for head, values in zip(self.heads, collected, strict=True):
            answers = _joined(answers, head.drawn(values))
        return answers

    def features(self, inputs: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """The deterministic prefix's features of each row, [N, D], under "features"; nothing where it has none."""
        found = features(self._prefix(inputs))
        return {} if found is None else {"features": found}

    def served_draws(self, inputs: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """The draws of `default`."""
        return self.draws(inputs, tf.constant(self.num_samples), _int64(self.seed))

    def adaptive(
        self, inputs: Sequence[tf.Tensor], tolerance: tf.Tensor, max_samples: tf.Tensor, seed: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Draw until each row's standard errors are at most `tolerance`, or `max_samples` draws are done.

        Every row stops at its own look of a fixed schedule, so its answer does not depend on its batch mates; rows that
        have converged leave the batch. Adds `num_samples` int32 [N] and `converged` bool [N].

        The standard error of the stopping rule has a floor of 1/T for probabilities (Laplace's rule for an outcome
        that no draw has shown yet): identical draws are not proof of certainty.
        """
        with tf.control_dependencies(_checks(max_samples)):
            max_samples = tf.identity(max_samples)
        prefix = self._prefix(inputs)
        rows = _rows(prefix)

        def finish(moments: list[Moments], total: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            summary = self._summary(moments, total)
            worst = self._stopping_error(moments, total)
            return [summary[name] for name in sorted(summary)], worst

        def goes_on(worst: tf.Tensor) -> tf.Tensor:
            # After a draw that is infinite or NaN no more of them help.
            return tf.logical_and(worst > tolerance, tf.math.is_finite(worst))

        first = tf.minimum(FIRST_LOOK, max_samples)
        moments = self._run(prefix, tf.constant(0), first, seed)
        summary, worst = finish(moments, first)
        names = sorted(self._summary(moments, first))
        used = tf.fill([rows], first)
        active = tf.cast(tf.where(goes_on(worst))[:, 0], tf.int32)
        state = _flatten(moments)
        running = [tf.gather(tensor, active) for tensor in state]

        def more(done: tf.Tensor, active: tf.Tensor, *_: Any) -> tf.Tensor:
            return tf.logical_and(done < max_samples, tf.size(active) > 0)

        def look(done: tf.Tensor, active: tf.Tensor, used: tf.Tensor, worst: tf.Tensor, *rest: tf.Tensor) -> Any:
            summary, running = list(rest[: len(names)]), list(rest[len(names) :])
            grown = tf.cast(tf.math.ceil(tf.cast(done, tf.float32) * LOOK_GROWTH), tf.int32)
            total = tf.minimum(grown, max_samples)
            chosen = [tf.gather(tensor, active) if _has_rows(tensor) else tensor for tensor in prefix]
            fresh = self._run(chosen, done, total - done, seed)
            merged = [merge(old, done, new, total - done) for old, new in zip(_unflatten(running), fresh, strict=True)]
            values, error = finish(merged, total)
            where = active[:, None]
            summary = [tf.tensor_scatter_nd_update(old, where, new) for old, new in zip(summary, values, strict=True)]
            worst = tf.tensor_scatter_nd_update(worst, where, error)
            used = tf.tensor_scatter_nd_update(used, where, tf.fill(tf.shape(active), total))
            still = tf.where(goes_on(error))[:, 0]
            kept = [tf.gather(tensor, still) for tensor in _flatten(merged)]
            return (total, tf.gather(active, still), used, worst, *summary, *kept)

        variables = [first, active, used, worst, *summary, *running]
        _, _, used, worst, *rest = tf.while_loop(
            more, look, variables, shape_invariants=[_loose(tensor) for tensor in variables], parallel_iterations=1
        )
        answers = self._decided(dict(zip(names, rest[: len(names)], strict=True)), prefix)
        return {**answers, "num_samples": used, "converged": worst <= tolerance}

    def made_up(self, rows: int, spread: float) -> list[tf.Tensor]:
        """Rows of input that the network runs with, see `models.trials`."""
        return made_up(self.input_specs, rows, spread, self.free_size, self.wants_whole)

    # How it is done.

    def _plan(self, task: Task | None, labels: list[str] | None, unit: str | None, has_noise: bool) -> None:
        """One dry pass: which tensors of the prefix the suffix reads, the noise it asks for, the outputs' shapes."""
        read: list[Any] = []
        # Of every member.
        asked: list[list[Noise]] = []
        shapes: list[list[tuple[int | None, ...]]] = []

        def dry(*inputs: tf.Tensor) -> list[tf.Tensor]:
            prefix = self.network.prefix(inputs)
            places: set[Any] = set()
            for member in range(self.network.members):
                draws = Draws(
                    tf.constant(2), lambda noise: noise.draw(tf.constant(0, tf.int64), tf.constant(0), tf.constant(2))
                )
                outputs, own = self.network.suffix(prefix, draws, member)
                self._refuse_other_than_numbers(outputs)
                places |= own
                asked.append(draws.noises)
                shapes.append([tuple(tensor.shape[1:]) for tensor in outputs])
            read.extend(place for place in prefix if place in places)
            return outputs

        graph = tf.function(dry, autograph=False).get_concrete_function(*self.input_specs).graph
        self._read = read
        # They set the size of a chunk.
        shape = self.network.widest_suffix() or _widest(graph)
        self._width = max(math.prod(shape), 64)
        self._least_rows = MIN_FLAT_CHUNK_ROWS if len(shape) == 1 else MIN_CHUNK_ROWS
        self.noises = asked[0]
        self._refuse_idle_layers({noise.layer for own in asked for noise in own})
        self._static_noise = all(noise.is_static for noise in self.noises)
        if any(own != shapes[0] for own in shapes) or (self._static_noise and any(own != asked[0] for own in asked)):
            raise ArtifactError(f"model {self.network.model.name!r}: its members are not of one architecture")
        self.heads = heads_of(self.network, shapes[0], task, labels, unit, self.made_up, has_noise)
        self._draw_shapes = [head.draw_shape for head in self.heads]

    def _refuse_other_than_numbers(self, outputs: list[tf.Tensor]) -> None:
        for name, tensor in zip(self.network.output_names(), outputs, strict=False):
            if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
                raise ArtifactError(
                    f"output {name!r}: its values are of type {tensor.dtype.name}, and draws of them have no mean; "
                    "wanted numbers: package a model without that output"
                )

    def _refuse_idle_layers(self, drawn: set[int]) -> None:
        """Without a layer that never draws in inference mode the answer would be surer than it should be."""
        for layer in self.network.stochastic_layers:
            if layer.index not in drawn:
                raise ArtifactError(
                    f"layer {layer.path!r}: it is never called with training=False, so that nothing is drawn (is it "
                    "called `if training` only, or not at all?); wanted a call in both modes, with `training` handed on"
                )

    def _keep_masks(self) -> None:
        """Draw the default seed's masks once, for as many of the first draws as KEPT_BYTES allows."""
        self.kept: list[tf.Variable] = []
        self.kept_draws = 0
        if self.masks == "balanced":
            self._balance_masks()
            return
        if not self._static_noise:
            return
        floats = sum(math.prod(noise.padded_shape) for noise in self.noises)
        self.kept_draws = min(max(self.num_samples, KEPT_DRAWS), KEPT_BYTES // (4 * floats))
        if self.kept_draws == 0:
            return
        seed, zero, count = tf.constant(self.seed, tf.int64), tf.constant(0), tf.constant(self.kept_draws)
        for number, noise in enumerate(self.noises):
            values = noise.draw(seed, zero, count)
            self.kept.append(tf.Variable(values, trainable=False, name=f"kept_mask_{number}"))

    def _balance_masks(self) -> None:
        """Keep balanced masks for exactly the default number of draws: the mean's variance falls to about a half."""
        if not self._static_noise or any(noise.kind != "keep" for noise in self.noises):
            raise ArtifactError("masks balanced: only for dropout on tensors of fixed size; wanted masks independent")
        needed = 4 * self.num_samples * sum(math.prod(noise.padded_shape) for noise in self.noises)
        if needed > KEPT_BYTES:
            raise ArtifactError(
                f"masks balanced: {needed} bytes of masks for {self.num_samples} draws, at most {KEPT_BYTES} can be "
                "kept; wanted fewer draws, or masks independent"
            )
        self.kept_draws = self.num_samples
        for number, noise in enumerate(self.noises):
            values = noise.balanced(self.seed, self.num_samples)
            self.kept.append(tf.Variable(values, trainable=False, name=f"kept_mask_{number}"))

    def _merge_masks(self) -> Merged | None:
        """The default draws' kept masks in the first layer that they meet, where its kernel stays small."""
        calls = Counter(noise.layer for noise in self.noises)
        for site in self.network.merge_sites() if self.kept_draws >= self.num_samples else []:
            kernel, bias = self.network.kernel_and_bias(site.dense)
            is_small = 4 * math.prod(kernel.shape) * self.num_samples <= MERGED_BYTES
            if is_small and all(calls[layer] == 1 for layer in site.layers):
                return merge_masks(site, kernel, bias, self.noises, self.kept, self.num_samples)
        return None

    def _make_suffixes(self) -> None:
        self._suffix = self._suffix_function()
        self._merged_suffix: Any = None if self.merged is None else self._suffix_function(self.merged)

    def _prefix(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        values = self.network.prefix(inputs)
        return [values[place] for place in self._read]

    def _suffix_function(self, merged: Merged | None = None) -> Any:
        """The suffix as one TensorFlow function that every signature calls: it is traced and stored once.

        With `merged`, which is of the same draws, it takes no noise that is in there.

        Arguments: the prefix's tensors, the noise arrays [C, ...] where their shapes are fixed (else the seed), the
        first draw (where something depends on it) and the number of draws C. Returns every head's quantity,
        [N, C, ...].
        """
        members = self.network.members
        noises = [noise for noise in self.noises if merged is None or noise.layer not in merged.site.layers]

        def suffix(*arguments: tf.Tensor) -> list[tf.Tensor]:
            *given, count = arguments
            prefix, rest = dict(zip(self._read, given, strict=False)), given[len(self._read) :]
            if self._static_noise:
                arrays = {noise.stream: array for noise, array in zip(noises, rest, strict=False)}

                def source(noise: Noise) -> tf.Tensor:
                    return arrays[noise.stream]
            else:

                def source(noise: Noise) -> tf.Tensor:
                    return noise.draw(rest[0], rest[1], count)

            if members == 1:
                return self._unfolded(self.network.suffix(prefix, Draws(count, source), merged=merged)[0], count)
            first, parts = rest[-1], []
            for member in range(members):
                own = turns(first, count, member, members)
                draws = Draws(tf.size(own), functools.partial(_of_draws, source, own))
                parts.append(self._unfolded(self.network.suffix(prefix, draws, member)[0], draws.num_draws))
            return [interleave(of_head, first, count) for of_head in zip(*parts, strict=True)]

        prefix = tf.function(self._prefix_of, autograph=False).get_concrete_function(*self.input_specs).outputs
        signature = [
            tf.TensorSpec([None, *tensor.shape[1:]] if _has_rows(tensor) else tensor.shape, tensor.dtype)
            for tensor in prefix
        ]
        if self._static_noise:
            signature += [tf.TensorSpec([None, *noise.padded_shape], tf.float32) for noise in noises]
        else:
            signature.append(tf.TensorSpec([], tf.int64))
        if self._first_matters:
            signature.append(tf.TensorSpec([], tf.int32))
        return tf.function(suffix, input_signature=[*signature, tf.TensorSpec([], tf.int32)], autograph=False)

    @property
    def _first_matters(self) -> bool:
        """Whether the suffix must be told its first draw: to draw its noise itself, or to know whose turn it is."""
        return not self._static_noise or self.network.members > 1

    def _unfolded(self, outputs: list[tf.Tensor], count: tf.Tensor) -> list[tf.Tensor]:
        """The network's outputs [N * C, ...] as every head's quantity [N, C, ...]."""
        quantities = []
        for head, shape, tensor in zip(self.heads, self._draw_shapes, outputs, strict=True):
            folded = head.draw(tensor)
            free = None in folded.shape[1:]
            sizes = tf.shape(folded)[1:] if free else folded.shape[1:]
            apart = tf.reshape(folded, tf.concat([[-1, count], sizes], axis=0) if free else [-1, count, *sizes])
            apart.set_shape([None, None, *shape])
            quantities.append(apart)
        return quantities

    def _prefix_of(self, *inputs: tf.Tensor) -> list[tf.Tensor]:
        return self._prefix(inputs)

    def _quantities(self, prefix: list[tf.Tensor], first: Any, count: Any, seed: Any) -> list[tf.Tensor]:
        """Draws first .. first + count - 1 of every head's quantity, [N, C, ...].

        Python numbers instead of tensors make a leaner graph.
        """
        return self._suffix_of(
            prefix, first, count, self._noise(first, count, seed) if self._static_noise else [], seed
        )

    def _suffix_of(
        self, prefix: list[tf.Tensor], first: Any, count: Any, noise: list[tf.Tensor], seed: Any
    ) -> list[tf.Tensor]:
        """`_quantities` with this noise; where the noise's shapes are not fixed, with that of the seed."""
        rest = list(noise) if self._static_noise else [_int64(seed)]
        if self._first_matters:
            rest.append(tf.convert_to_tensor(first))
        return self._suffix(*prefix, *rest, tf.convert_to_tensor(count))

    def _noise(self, first: Any, count: Any, seed: Any) -> list[tf.Tensor]:
        """The noise arrays [C, ...] of draws first .. first + count - 1: kept where they are, else drawn."""
        if not self.kept:
            return self._drawn_noise(first, count, seed)
        return tf.cond(
            tf.logical_and(tf.equal(seed, self.seed), first + count <= self.kept_draws),
            lambda: self._kept_noise(first, count),
            lambda: self._drawn_noise(first, count, seed),
        )

    def _drawn_noise(self, first: Any, count: Any, seed: Any) -> list[tf.Tensor]:
        at, number = tf.convert_to_tensor(first), tf.convert_to_tensor(count)
        return [noise.draw(_int64(seed), at, number) for noise in self.noises]

    def _kept_noise(self, first: Any, count: Any) -> list[tf.Tensor]:
        if isinstance(first, int) and isinstance(count, int) and (first, count) == (0, self.kept_draws):
            return [tf.convert_to_tensor(variable) for variable in self.kept]
        return [
            tf.slice(variable, [first, *[0] * (variable.shape.rank - 1)], [count, *variable.shape[1:]])
            for variable in self.kept
        ]

    def _chunk_size(self, rows: tf.Tensor) -> tf.Tensor:
        """Draws a chunk for this many rows. Members share them out."""
        return tf.maximum(self._fitting(rows), 1)

    def _fitting(self, rows: tf.Tensor) -> tf.Tensor:
        """`_chunk_size`, but 0 where a single draw of so many rows is more than a chunk should be."""
        return self._folded_rows() // tf.maximum(rows, 1)

    def _folded_rows(self) -> int:
        """Rows x draws of one chunk."""
        least = max(min(self._least_rows, MOST_CHUNK_FLOATS // self._width), 1)
        return max(CHUNK_FLOATS // self._width, least) * self.network.members

    def _next_chunk(self, step: tf.Tensor, at: tf.Tensor, left: Any, seed: Any) -> tf.Tensor:
        """Draws in the chunk that begins at draw `at`, with `left` draws to go."""
        # Chunks of one size: a short last one would waste the matrix products.
        chunks = tf.maximum((left + step - 1) // step, 1)
        size = (left + chunks - 1) // chunks
        if self.masks == "independent":
            return size
        # Balanced masks are not what the stream would give: a chunk takes all its masks from the one or the other.
        inside = tf.logical_and(tf.equal(_int64(seed), self.seed), at < self.kept_draws)
        return tf.where(inside, tf.minimum(size, self.kept_draws - at), size)

    def _sample(self, inputs: Sequence[tf.Tensor], count: Any, seed: Any) -> dict[str, tf.Tensor]:
        """Statistics of draws 0 .. count - 1. What fits in one chunk of kept masks has a path of its own."""
        prefix = self._prefix(inputs)
        fits = self._fitting(_rows(prefix))
        number, key = tf.convert_to_tensor(count), _int64(seed)
        if isinstance(count, int) and (count < MIN_QUANTILE_DRAWS or count > self.kept_draws):
            answers = self._any(*prefix, number, key)
        elif isinstance(count, int):
            answers = tf.cond(
                count <= fits, lambda: self._kept_answers(prefix, count), lambda: self._chunked(*prefix, number, key)
            )
        elif self.kept_draws < MIN_QUANTILE_DRAWS:
            answers = self._any(*prefix, number, key)
        else:
            quick = tf.logical_and(
                tf.logical_and(tf.equal(key, self.seed), number >= MIN_QUANTILE_DRAWS),
                number <= tf.minimum(fits, self.kept_draws),
            )
            answers = tf.cond(
                quick, lambda: self._kept_answers(prefix, number), lambda: self._any(*prefix, number, key)
            )
        return self._decided(dict(zip(self._names, answers, strict=True)), prefix)

    def _answers(self, moments: list[Moments], count: Any, enough: bool = False) -> list[tf.Tensor]:
        """The summary in the order of its sorted names, which are noted."""
        summary = self._summary(moments, count, enough)
        self._names = sorted(summary)
        return [summary[name] for name in self._names]

    def _kept_answers(self, prefix: list[tf.Tensor], count: Any, merged: Merged | None = None) -> list[tf.Tensor]:
        """Answers of one chunk of kept masks, with draws enough for quantiles. merged: of `count` draws."""
        noise = self._kept_noise(0, count)
        if merged is None:
            quantities = self._suffix_of(prefix, 0, count, noise, self.seed)
        else:
            own = [
                array for known, array in zip(self.noises, noise, strict=True) if known.layer not in merged.site.layers
            ]
            quantities = self._merged_suffix(*prefix, *own, tf.convert_to_tensor(count))
        # Nothing to cut where there are no more draws than quantiles take.
        cut = 0 if self.kept_draws > QUANTILE_DRAWS else None
        return self._answers(
            [head.moments(values, cut) for head, values in zip(self.heads, quantities, strict=True)], count, True
        )

    def _paths(self) -> tuple[Any, Any]:
        """Two functions of the prefix's tensors, the number of draws and the seed, which give the sorted answers.

        The first is for any number and seed, the second for several chunks. They are not inlined: TensorFlow visits
        every operation of a branch that it does not take, and there are hundreds of them.
        """

        def chunked(*arguments: tf.Tensor) -> list[tf.Tensor]:
            *prefix, count, seed = arguments
            return self._answers(self._run(prefix, tf.constant(0), count, seed), count)

        def general(*arguments: tf.Tensor) -> list[tf.Tensor]:
            *prefix, count, seed = arguments
            with tf.control_dependencies(_checks(count)):
                count = tf.identity(count)

            def at_once() -> list[tf.Tensor]:
                noise = self._drawn_noise(0, count, seed) if self._static_noise else []
                quantities = self._suffix_of(prefix, 0, count, noise, seed)
                return self._answers(
                    [head.moments(values, 0) for head, values in zip(self.heads, quantities, strict=True)], count
                )

            one = tf.equal(self._next_chunk(self._chunk_size(_rows(prefix)), tf.constant(0), count, seed), count)
            if self.kept:
                kept = tf.logical_and(tf.equal(seed, self.seed), count <= self.kept_draws)
                one = tf.logical_and(one, tf.logical_not(kept))
            return tf.cond(one, at_once, lambda: self._chunked(*arguments))

        apart: dict[str, Any] = {"autograph": False, "experimental_attributes": {"_noinline": True}}
        return tf.function(general, **apart), tf.function(chunked, **apart)

    def _decided(self, answers: dict[str, tf.Tensor], prefix: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        """The summaries, and what follows from them and from the prefix's features by calibration."""
        known = features(prefix)
        if self.novelty is not None and known is not None:
            novelty = self.novelty.of(known)
            answers = _joined(answers, {head.output.prefix + NOVELTY: novelty for head in self.heads})
        for head in self.heads:
            answers = _joined(answers, head.decisions(answers))
        return answers

    def _moments(self, prefix: list[tf.Tensor], first: Any, count: Any, seed: Any) -> list[Moments]:
        """Moments of one chunk."""
        quantities = self._quantities(prefix, first, count, seed)
        return [head.moments(values, first) for head, values in zip(self.heads, quantities, strict=True)]

    def _run(self, prefix: list[tf.Tensor], first: tf.Tensor, count: Any, seed: Any) -> list[Moments]:
        """Moments of draws first .. first + count - 1, chunk by chunk."""
        step = self._chunk_size(_rows(prefix))
        size = self._next_chunk(step, first, count, seed)
        begun = _flatten(self._moments(prefix, first, size, seed))

        def body(done: tf.Tensor, *seen: tf.Tensor) -> tuple[tf.Tensor, ...]:
            size = self._next_chunk(step, first + done, count - done, seed)
            fresh = self._moments(prefix, first + done, size, seed)
            merged = [merge(old, done, new, size) for old, new in zip(_unflatten(list(seen)), fresh, strict=True)]
            return (done + size, *_flatten(merged))

        _, *moments = tf.while_loop(
            lambda done, *_: done < count,
            body,
            [size, *begun],
            shape_invariants=[tf.TensorShape([]), *[_loose(tensor) for tensor in begun]],
            parallel_iterations=1,
        )
        return _unflatten(moments)

    def _summary(self, moments: list[Moments], num_draws: Any, enough: bool = False) -> dict[str, tf.Tensor]:
        answers: dict[str, tf.Tensor] = {}
        for head, of_head in zip(self.heads, moments, strict=True):
            answers = _joined(answers, head.summary(of_head, num_draws, enough))
        return answers

    def _stopping_error(self, moments: list[Moments], num_draws: tf.Tensor) -> tf.Tensor:
        """Largest standard error of each row over all outputs, [rows]; infinite where one of them is NaN."""
        floor = 1.0 / tf.cast(num_draws, tf.float32)
        errors = []
        for head, of_head in zip(self.heads, moments, strict=True):
            error = head.standard_error(of_head, num_draws)
            # The largest of some of which one is NaN is what their order makes of it.
            error = tf.where(tf.math.is_nan(error), float("inf"), error)
            if head.is_classification:
                error = tf.maximum(error, floor)
            errors.append(tf.reduce_max(error, axis=list(range(1, error.shape.rank))))
        return tf.reduce_max(tf.stack(errors), axis=0)


def _joined(answers: dict[str, tf.Tensor], more: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Both outputs' answers. Raises ArtifactError where one name would stand for two of them."""
    both = sorted(answers.keys() & more.keys())
    if both:
        raise ArtifactError(
            f"outputs: {both[0]!r} in the signatures would be an answer of two of them; rename one of the outputs"
        )
    return answers | more


def _of_draws(source: Callable[[Noise], tf.Tensor], own: tf.Tensor, noise: Noise) -> tf.Tensor:
    """The noise of some draws of a chunk; `source` gives that of all."""
    return tf.gather(source(noise), own)


def _int64(seed: Any) -> tf.Tensor:
    return tf.cast(seed, tf.int64) if isinstance(seed, tf.Tensor) else tf.constant(seed, tf.int64)


def _checks(num_samples: tf.Tensor) -> list[tf.Operation]:
    check = tf.debugging.assert_greater_equal(
        num_samples, MIN_NUM_SAMPLES, message=f"num_samples: wanted at least {MIN_NUM_SAMPLES} draws"
    )
    return [] if check is None else [check]


def _rows(prefix: list[tf.Tensor]) -> tf.Tensor:
    return tf.shape(next(tensor for tensor in prefix if _has_rows(tensor)))[0]


def _has_rows(tensor: tf.Tensor) -> bool:
    """Whether the first axis is the rows': what is the same for every row (positions, constants) has a fixed shape."""
    return tensor.shape.rank > 0 and tensor.shape[0] is None


def _widest(graph: tf.Graph) -> tuple[int, ...]:
    """Shape of one row of the widest tensor with rows."""
    tensors = [tensor for operation in graph.get_operations() for tensor in operation.outputs]
    return widest(tensor for tensor in tensors if tensor.shape.rank is not None and _has_rows(tensor))


def _flatten(moments: list[Moments]) -> list[tf.Tensor]:
    return [tensor for of_head in moments for tensor in of_head]


def _unflatten(tensors: list[tf.Tensor]) -> list[Moments]:
    size = len(Moments._fields)
    return [Moments(*tensors[start : start + size]) for start in range(0, len(tensors), size)]


def _loose(tensor: tf.Tensor) -> tf.TensorShape:
    """The tensor's shape with rows (and, for the first draws, their number) left free."""
    return tf.TensorShape([None, *tensor.shape[1:]] if tensor.shape.rank else [])
