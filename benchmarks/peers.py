"""The peers: other frameworks doing the same work from the same weights.

Every one comes in two forms. *folded* is what its documentation leads to: the rows repeated T times, the framework's
own dropout with a mask for every row, one call. *tuned* is what an expert could still do by hand for each network: what
no dropout reaches is computed once, masks are shared over rows, and whatever is fastest in the cell of: masks drawn by
the framework or by NumPy, all draws in one call or in calls that stay in the cache. Draws are folded draw by draw:
[draws * rows, ...].
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import nets
from benchmarks.contestants import (
    CACHED_FLOATS,
    FOLDED_FLOATS,
    STEPS_FILE,
    Answer,
    Run,
    Unsuitable,
    fastest_gemm,
    folded_draws,
)
from benchmarks.nets import Net, Step


def follow(steps: list[Step], ops: Any, values: dict[str, Any], folded: set[str], draws: int) -> dict[str, Any]:
    """All tensors by name in the framework of `ops`; those that a dropout reaches are folded, [draws * rows, ...].

    values: the tensors given, of them `folded` folded. ops: `tile(x, draws)`, `drop(step, x, is_folded)` and one method
    (step, *inputs) for each other kind of step.
    """
    values, folded = dict(values), set(folded)
    tiled: dict[str, Any] = {}
    for step in steps:
        if step.kind == "dropout":
            (name,) = step.inputs
            values[step.output] = ops.drop(step, values[name], name in folded)
            folded.add(step.output)
            continue
        arguments = [values[name] for name in step.inputs]
        if folded & set(step.inputs):
            for place, name in enumerate(step.inputs):
                if name not in folded:
                    if name not in tiled:
                        tiled[name] = ops.tile(values[name], draws)
                    arguments[place] = tiled[name]
            folded.add(step.output)
        values[step.output] = getattr(ops, step.kind)(step, *arguments)
    return values


@dataclass(frozen=True)
class _Form:
    """What one call does. draws: a call. tuned: masks shared over rows. fed: NumPy draws them.

    before, steps: those done once a cell, and those of every call; given: names that the calls read of the former.
    """

    net: Net
    rows: int
    draws: int
    tuned: bool
    fed: bool
    before: list[Step]
    steps: list[Step]
    given: list[str]

    def answer(self, ops: Any, values: dict[str, Any]) -> Any:
        """The network's answers [draws * rows, outputs] from the given values."""
        if not self.tuned:
            values = {"input": ops.tile(values["input"], self.draws)}
        found = follow(self.steps, ops, values, set() if self.tuned else {"input"}, self.draws)
        return found[self.net.steps[-1].output]

    def begun(self, ops: Any, x: Any) -> dict[str, Any]:
        """What the calls are given, from the rows."""
        values = follow(self.before, ops, {"input": x}, set(), self.draws)
        return {name: values[name] for name in self.given}


class _Peer:
    """What all peers do alike: read the steps, and find the ways to the tuned form."""

    # Where the masks of the tuned form may come from: True if NumPy draws them.
    mask_sources: tuple[bool, ...] = (True, False)
    # Whether a single call should hold everything, as compiled graphs do best.
    is_compiled = True

    def __init__(self) -> None:
        self._net: Net

    def load(self, letter: str, folder: Path) -> Net:
        self._net = pickle.loads((folder / STEPS_FILE).read_bytes())
        return self._net

    def ways(self, name: str, rows: int, draws: int) -> list[Run]:
        net = self._net
        x = nets.inputs(net.input_shape, rows)
        if not name.endswith("tuned"):
            step = folded_draws(net.widest(), rows, draws)
            return [self.run(_Form(net, rows, step, False, False, [], net.steps, ["input"]), x)]
        prefix, suffix, border = net.split()
        widest = net.widest(net.noisy())
        found = []
        for step in {folded_draws(widest, rows, draws, floats) for floats in (FOLDED_FLOATS, CACHED_FLOATS)}:
            for fed in self.mask_sources:
                if self.is_compiled and step == draws:
                    form = _Form(net, rows, step, True, fed, [], net.steps, ["input"])
                else:
                    form = _Form(net, rows, step, True, fed, prefix, suffix, border)
                found.append(self.run(form, x))
        return found

    def run(self, form: _Form, x: np.ndarray) -> Run:
        raise NotImplementedError


class _Masks:
    """Masks that NumPy draws for a tuned form: shared over rows, 16-bit numbers of its fastest generator.

    As ours of fewer bits, where those give the rate exactly.
    """

    def __init__(self, form: _Form) -> None:
        self._dropouts = [step for step in form.steps if step.kind == "dropout"] if form.fed else []
        self._draws = form.draws
        self._bits = np.random.SFC64()

    def draw(self) -> dict[str, np.ndarray]:
        """One float32 array [draws, 1, *shape of a row] for each dropout, by its step's output: 0 or 1 / (1 - rate)."""
        return {step.output: self._draw(step.settings["rate"], step.shape) for step in self._dropouts}

    def _draw(self, rate: float, shape: tuple[int, ...]) -> np.ndarray:
        count = self._draws * math.prod(shape)
        bits = next((bits for bits in (1, 2, 4, 8) if (rate * 2**bits).is_integer()), 16)
        numbers: Any = self._bits.random_raw((count * bits + 63) // 64).view(np.uint16 if bits == 16 else np.uint8)
        least: Any = np.asarray([round(rate * 2**bits)], numbers.dtype)
        if bits < 8:
            shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, np.newaxis]
            numbers, least = numbers & np.uint8(2**bits - 1) << shifts, least << shifts
        kept = (numbers >= least).reshape(-1)[:count]
        return np.multiply(kept, np.float32(1 / (1 - rate)), dtype=np.float32).reshape(self._draws, 1, *shape)


def _same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "same": the odd one at the end."""
    total = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


# NumPy


class NumPy(_Peer):
    names = ("NumPy tuned",)
    mask_sources = (True,)
    is_compiled = False

    def run(self, form: _Form, x: np.ndarray) -> Run:
        if any(step.kind in ("conv", "depthwise") for step in form.net.steps):
            raise Unsuitable("it has no convolutions")
        masks = _Masks(form)

        def draw(given: dict[str, np.ndarray]) -> Answer:
            found = form.answer(_NumPyOps(masks.draw()), given).reshape(form.draws, form.rows, -1)
            return found.mean(axis=0), found.std(axis=0)

        return Run(form.draws, draw, lambda: form.begun(_NumPyOps({}), x))

    def gemm(self, size: int) -> float:
        a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
        return fastest_gemm(lambda: a @ a, size)


class _NumPyOps:
    def __init__(self, masks: dict[str, np.ndarray]) -> None:
        self._masks = masks

    def tile(self, x: np.ndarray, draws: int) -> np.ndarray:
        return np.tile(x, (draws, *[1] * (x.ndim - 1)))

    def drop(self, step: Step, x: np.ndarray, is_folded: bool) -> np.ndarray:
        keep = self._masks[step.output]
        apart = x.reshape(len(keep) if is_folded else 1, -1, *step.shape)
        return (apart * keep).reshape(-1, *step.shape)

    def dense(self, step: Step, x: np.ndarray) -> np.ndarray:
        return x @ step.weights["kernel"] + step.weights["bias"]

    def relu(self, step: Step, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    def sigmoid(self, step: Step, x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def softmax(self, step: Step, x: np.ndarray) -> np.ndarray:
        raised = np.exp(x - x.max(axis=-1, keepdims=True))
        return raised / raised.sum(axis=-1, keepdims=True)

    def add(self, step: Step, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def mean_pool(self, step: Step, x: np.ndarray) -> np.ndarray:
        return x.mean(axis=tuple(range(1, x.ndim - 1)))

    def layer_norm(self, step: Step, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + step.settings["epsilon"]) * step.weights["gamma"] + step.weights["beta"]

    def split_heads(self, step: Step, x: np.ndarray) -> np.ndarray:
        kernel = step.weights["kernel"]
        found = x @ kernel.reshape(len(kernel), -1) + step.weights["bias"].reshape(-1)
        return found.reshape(-1, *step.shape)

    def scores(self, step: Step, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return self.softmax(step, query.transpose(0, 2, 1, 3) @ key.transpose(0, 2, 3, 1) * step.settings["scale"])

    def attend(self, step: Step, scores: np.ndarray, value: np.ndarray) -> np.ndarray:
        return (scores @ value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def merge_heads(self, step: Step, x: np.ndarray) -> np.ndarray:
        kernel = step.weights["kernel"]
        flat = x.reshape(*x.shape[:2], -1)
        return flat @ kernel.reshape(-1, kernel.shape[-1]) + step.weights["bias"]


# PyTorch


class PyTorch(_Peer):
    names = ("PyTorch folded", "PyTorch tuned")
    # Its own generator takes several times as long.
    mask_sources = (True,)
    is_compiled = False

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
        self._torch = torch

    def load(self, letter: str, folder: Path) -> Net:
        net = super().load(letter, folder)
        self._weights = {step.output: _torch_weights(self._torch, step) for step in net.steps}
        return net

    def run(self, form: _Form, x: np.ndarray) -> Run:
        torch = self._torch
        masks = _Masks(form)
        rows = torch.from_numpy(x)

        def begin() -> dict[str, Any]:
            with torch.inference_mode():
                return form.begun(_TorchOps(torch, self._weights, {}), rows)

        def draw(given: dict[str, Any]) -> Answer:
            with torch.inference_mode():
                drawn = {name: torch.from_numpy(mask) for name, mask in masks.draw().items()}
                found = form.answer(_TorchOps(torch, self._weights, drawn), given).reshape(form.draws, form.rows, -1)
                return found.mean(dim=0).numpy(), found.std(dim=0, correction=0).numpy()

        return Run(form.draws, draw, begin)


def _torch_weights(torch: Any, step: Step) -> dict[str, Any]:
    """Dense kernels [outputs, inputs]; convolutions in the channels-last memory format."""
    weights = {name: torch.from_numpy(np.array(value)) for name, value in step.weights.items()}
    if step.kind == "dense":
        weights["kernel"] = weights["kernel"].T.contiguous()
    elif step.kind == "split_heads":
        weights["kernel"] = weights["kernel"].flatten(1).T.contiguous()
        weights["bias"] = weights["bias"].flatten()
    elif step.kind == "merge_heads":
        weights["kernel"] = weights["kernel"].flatten(0, 1).T.contiguous()
    elif step.kind == "conv":
        weights["kernel"] = weights["kernel"].permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    elif step.kind == "depthwise":
        weights["kernel"] = weights["kernel"].permute(2, 0, 1)[:, None].contiguous(memory_format=torch.channels_last)
    return weights


class _TorchOps:
    """Images are NHWC here; to a convolution the same memory is a channels-last NCHW tensor."""

    def __init__(self, torch: Any, weights: dict[str, dict[str, Any]], masks: dict[str, Any]) -> None:
        self._torch, self._functional = torch, torch.nn.functional
        self._weights, self._masks = weights, masks

    def tile(self, x: Any, draws: int) -> Any:
        return x.repeat(draws, *[1] * (x.dim() - 1))

    def drop(self, step: Step, x: Any, is_folded: bool) -> Any:
        keep = self._masks.get(step.output)
        if keep is None:
            return self._functional.dropout(x, step.settings["rate"], training=True)
        apart = x.reshape(len(keep) if is_folded else 1, -1, *step.shape)
        return (apart * keep).reshape(-1, *step.shape)

    def dense(self, step: Step, x: Any) -> Any:
        weights = self._weights[step.output]
        return self._functional.linear(x, weights["kernel"], weights["bias"])

    def conv(self, step: Step, x: Any, groups: int = 1) -> Any:
        weights, stride = self._weights[step.output], step.settings["strides"]
        images = x.permute(0, 3, 1, 2)
        if step.settings["padding"] == "same":
            window = weights["kernel"].shape[-1]
            rows, columns = (_same_padding(size, window, stride) for size in images.shape[2:])
            if rows[0] == rows[1] and columns[0] == columns[1]:
                padding = (rows[0], columns[0])
            else:
                images, padding = self._functional.pad(images, (*columns, *rows)), (0, 0)
        else:
            padding = (0, 0)
        found = self._functional.conv2d(images, weights["kernel"], weights["bias"], stride, padding, groups=groups)
        return found.permute(0, 2, 3, 1)

    def depthwise(self, step: Step, x: Any) -> Any:
        return self.conv(step, x, groups=x.shape[-1])

    def zero_pad(self, step: Step, x: Any) -> Any:
        rows, columns = step.settings["padding"]
        return self._functional.pad(x, (0, 0, *columns, *rows))

    def max_pool(self, step: Step, x: Any) -> Any:
        return self._functional.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    def mean_pool(self, step: Step, x: Any) -> Any:
        return x.mean(dim=tuple(range(1, x.dim() - 1)))

    def flatten(self, step: Step, x: Any) -> Any:
        return x.reshape(x.shape[0], -1)

    def relu(self, step: Step, x: Any) -> Any:
        return self._torch.relu(x)

    def relu6(self, step: Step, x: Any) -> Any:
        return self._functional.relu6(x)

    def sigmoid(self, step: Step, x: Any) -> Any:
        return self._torch.sigmoid(x)

    def softmax(self, step: Step, x: Any) -> Any:
        return self._torch.softmax(x, dim=-1)

    def add(self, step: Step, x: Any, y: Any) -> Any:
        return x + y

    def layer_norm(self, step: Step, x: Any) -> Any:
        weights = self._weights[step.output]
        return self._functional.layer_norm(x, x.shape[-1:], weights["gamma"], weights["beta"], step.settings["epsilon"])

    def split_heads(self, step: Step, x: Any) -> Any:
        return self.dense(step, x).reshape(-1, *step.shape)

    def scores(self, step: Step, query: Any, key: Any) -> Any:
        products = query.permute(0, 2, 1, 3) @ key.permute(0, 2, 3, 1)
        return self._torch.softmax(products * step.settings["scale"], dim=-1)

    def attend(self, step: Step, scores: Any, value: Any) -> Any:
        return (scores @ value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)

    def merge_heads(self, step: Step, x: Any) -> Any:
        return self.dense(step, x.flatten(2))


# JAX


class Jax(_Peer):
    names = ("JAX folded", "JAX tuned")

    def __init__(self) -> None:
        import jax

        self._jax = jax
        # Threefry: XLA's own generator (rbg) is slower on a CPU.
        self._key = jax.random.key(0, impl="threefry2x32")

    def run(self, form: _Form, x: np.ndarray) -> Run:
        jax = self._jax
        masks = _Masks(form)

        @jax.jit
        def begun(x: Any) -> Any:
            return form.begun(_JaxOps(jax, None, {}, form), x)

        @jax.jit
        def drawn(key: Any, given: dict[str, Any], fed: dict[str, Any]) -> Any:
            found = form.answer(_JaxOps(jax, key, fed, form), given).reshape(form.draws, form.rows, -1)
            return found.mean(axis=0), found.std(axis=0), jax.random.split(key, 1)[0]

        rows = jax.device_put(x)

        def draw(given: dict[str, Any]) -> Answer:
            mean, std, self._key = drawn(self._key, given, masks.draw())
            return np.asarray(mean), np.asarray(std)

        if not form.before:
            return Run(form.draws, draw, lambda: {"input": rows})
        return Run(form.draws, draw, lambda: jax.block_until_ready(begun(rows)))


class _JaxOps:
    """Weights are constants of the compiled program."""

    def __init__(self, jax: Any, key: Any, masks: dict[str, Any], form: _Form) -> None:
        self._jax, self._numpy = jax, jax.numpy
        self._key, self._masks, self._draws, self._tuned = key, masks, form.draws, form.tuned
        self._dropped = 0

    def tile(self, x: Any, draws: int) -> Any:
        return self._numpy.tile(x, (draws, *[1] * (x.ndim - 1)))

    def drop(self, step: Step, x: Any, is_folded: bool) -> Any:
        rate = step.settings["rate"]
        apart = x.reshape(self._draws if is_folded else 1, -1, *step.shape)
        if step.output in self._masks:
            return (apart * self._masks[step.output]).reshape(-1, *step.shape)
        self._dropped += 1
        key = self._jax.random.fold_in(self._key, self._dropped)
        if self._tuned:
            keep = self._halves(key, (self._draws, 1, *step.shape)) >= round(rate * 2**16)
        else:
            keep = self._jax.random.bernoulli(key, 1 - rate, (self._draws, apart.shape[1], *step.shape))
        return self._numpy.where(keep, apart / (1 - rate), 0.0).reshape(-1, *step.shape)

    def _halves(self, key: Any, shape: tuple[int, ...]) -> Any:
        """16-bit numbers, two of a 32-bit word: half the work of jax.random.bits(..., "uint16")."""
        count = math.prod(shape)
        words = self._jax.random.bits(key, ((count + 1) // 2,), "uint32")
        return self._jax.lax.bitcast_convert_type(words, "uint16").reshape(-1)[:count].reshape(shape)

    def dense(self, step: Step, x: Any) -> Any:
        return x @ step.weights["kernel"] + step.weights["bias"]

    def conv(self, step: Step, x: Any) -> Any:
        stride = step.settings["strides"]
        found = self._jax.lax.conv_general_dilated(
            x,
            step.weights["kernel"],
            (stride, stride),
            step.settings["padding"].upper(),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return found + step.weights["bias"]

    def depthwise(self, step: Step, x: Any) -> Any:
        """A sum of shifted products: XLA's own depthwise convolution is ten times slower on a CPU."""
        kernel, stride = step.weights["kernel"], step.settings["strides"]
        if step.settings["padding"] == "same":
            edges = (
                _same_padding(size, window, stride) for size, window in zip(x.shape[1:3], kernel.shape, strict=False)
            )
            x = self._numpy.pad(x, ((0, 0), *edges, (0, 0)))
        rows, columns = ((size - 1) * stride + 1 for size in step.shape[:2])
        shifts = [
            x[:, row : row + rows : stride, column : column + columns : stride] * kernel[row, column]
            for row in range(kernel.shape[0])
            for column in range(kernel.shape[1])
        ]
        return sum(shifts[1:], shifts[0]) + step.weights["bias"]

    def zero_pad(self, step: Step, x: Any) -> Any:
        return self._numpy.pad(x, ((0, 0), *step.settings["padding"], (0, 0)))

    def max_pool(self, step: Step, x: Any) -> Any:
        window = (1, 2, 2, 1)
        return self._jax.lax.reduce_window(x, -self._numpy.inf, self._jax.lax.max, window, window, "VALID")

    def mean_pool(self, step: Step, x: Any) -> Any:
        return x.mean(axis=tuple(range(1, x.ndim - 1)))

    def flatten(self, step: Step, x: Any) -> Any:
        return x.reshape(x.shape[0], -1)

    def relu(self, step: Step, x: Any) -> Any:
        return self._numpy.maximum(x, 0)

    def relu6(self, step: Step, x: Any) -> Any:
        return self._numpy.clip(x, 0, 6)

    def sigmoid(self, step: Step, x: Any) -> Any:
        return self._jax.nn.sigmoid(x)

    def softmax(self, step: Step, x: Any) -> Any:
        return self._jax.nn.softmax(x)

    def add(self, step: Step, x: Any, y: Any) -> Any:
        return x + y

    def layer_norm(self, step: Step, x: Any) -> Any:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        scale = self._jax.lax.rsqrt(variance + step.settings["epsilon"])
        return centred * scale * step.weights["gamma"] + step.weights["beta"]

    def split_heads(self, step: Step, x: Any) -> Any:
        kernel = step.weights["kernel"]
        found = x @ kernel.reshape(len(kernel), -1) + step.weights["bias"].reshape(-1)
        return found.reshape(-1, *step.shape)

    def scores(self, step: Step, query: Any, key: Any) -> Any:
        products = query.transpose(0, 2, 1, 3) @ key.transpose(0, 2, 3, 1)
        return self._jax.nn.softmax(products * step.settings["scale"])

    def attend(self, step: Step, scores: Any, value: Any) -> Any:
        return (scores @ value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def merge_heads(self, step: Step, x: Any) -> Any:
        kernel = step.weights["kernel"]
        return x.reshape(*x.shape[:2], -1) @ kernel.reshape(-1, kernel.shape[-1]) + step.weights["bias"]


# ONNX Runtime and OpenVINO run the same graph.


class _OnnxPeer(_Peer):
    """One graph a cell, all shapes fixed, mean and deviation inside; masks from the graph's RandomUniform or fed."""

    def run(self, form: _Form, x: np.ndarray) -> Run:
        rows = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x
        masks = _Masks(form)
        layouts = _OnnxOps(form)
        if form.before:
            prepare = self.compiled(layouts.before())
        graph = _OnnxOps(form, layouts.images_given)
        infer = self.compiled(graph.answer())

        def begin() -> dict[str, np.ndarray]:
            if not form.before:
                return {"input": rows}
            return dict(zip(form.given, prepare({"input": rows}), strict=True))

        def draw(given: dict[str, np.ndarray]) -> Answer:
            fed = {name: mask.reshape(graph.fed[name]) for name, mask in masks.draw().items()}
            mean, std = infer({**given, **fed})
            return mean, std

        return Run(form.draws, draw, begin)

    def compiled(self, model: Any) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        raise NotImplementedError


class OnnxRuntime(_OnnxPeer):
    names = ("ONNX Runtime folded", "ONNX Runtime tuned")

    def compiled(self, model: Any) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda feeds: session.run(None, feeds)


class OpenVino(_OnnxPeer):
    names = ("OpenVINO folded", "OpenVINO tuned")

    def __init__(self) -> None:
        import openvino

        self._core = openvino.Core()
        # Its default would be bfloat16 where the processor has it.
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }

    def compiled(self, model: Any) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        read = self._core.read_model(model.SerializeToString())
        request = self._core.compile_model(read, "CPU", self._settings).create_infer_request()

        def infer(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            found = request.infer(feeds, share_inputs=True, share_outputs=True)
            # Shared outputs are overwritten by the next call.
            return [found[place].copy() for place in range(len(found))]

        return infer


_ONNX_OPSET, _ONNX_IR = 20, 10


class _OnnxOps:
    """Builds the graph; a value is a tensor's name. Images are NCHW."""

    def __init__(self, form: _Form, images_given: frozenset[str] = frozenset()) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self._helper, self._numpy, self._float = helper, numpy_helper, TensorProto.FLOAT
        self._form, self._rows, self._draws, self._tuned = form, form.rows, form.draws, form.tuned
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        # Shapes of one row, as in the steps; which tensors are images.
        self._shapes = {"input": form.net.input_shape} | {step.output: step.shape for step in form.before}
        self._images: set[str] = set(images_given)
        if len(form.net.input_shape) == 3:
            self._images.add("input")
        # Names of what the calls are given that are images; known after `before()`.
        self.images_given = images_given
        # Shapes of the masks that are inputs.
        self.fed: dict[str, tuple[int, ...]] = {}

    def before(self) -> Any:
        """The graph that is run once a cell: from the rows to what the calls are given, in that order."""
        found = self._form.begun(self, "input")
        self.images_given = frozenset(name for name, tensor in found.items() if tensor in self._images)
        # An output needs a node of its own: it may be the input itself.
        outputs = [(self._node("Identity", tensor), self._layout(name)) for name, tensor in found.items()]
        return self._model(["input"], outputs)

    def answer(self) -> Any:
        """The graph of one call: mean and deviation of its draws, each [rows, outputs]."""
        outputs = self._form.net.steps[-1].shape[-1]
        found = self._form.answer(self, {name: name for name in self._form.given})
        apart = self._reshape(found, (self._draws, self._rows, outputs))
        axes = self._constant(np.array([0], np.int64))
        mean = self._node("ReduceMean", apart, axes, keepdims=1)
        centred = self._node("Sub", apart, mean)
        variance = self._node("ReduceMean", self._node("Mul", centred, centred), axes, keepdims=0)
        results = (self._node("Squeeze", mean, axes), self._node("Sqrt", variance))
        return self._model(self._form.given, [(name, (outputs,)) for name in results])

    def _layout(self, name: str) -> tuple[int, ...]:
        """Shape of one row of what is given, as the graph has it."""
        shape = self._shapes[name]
        is_image = name in self.images_given or (name == "input" and len(shape) == 3)
        return (shape[2], *shape[:2]) if is_image else shape

    def _model(self, given: list[str], outputs: list[tuple[str, tuple[int, ...]]]) -> Any:
        helper = self._helper
        graph = helper.make_graph(
            self._nodes,
            self._form.net.name,
            [
                *(
                    helper.make_tensor_value_info(name, self._float, (self._rows, *self._layout(name)))
                    for name in given
                ),
                *(helper.make_tensor_value_info(name, self._float, mask) for name, mask in self.fed.items()),
            ],
            [helper.make_tensor_value_info(name, self._float, (self._rows, *shape)) for name, shape in outputs],
            list(self._constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _ONNX_OPSET)], ir_version=_ONNX_IR)

    def _node(self, kind: str, *inputs: str, **settings: Any) -> str:
        output = f"t{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(kind, list(inputs), [output], **settings))
        return output

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = self._numpy.from_array(np.ascontiguousarray(value), name)
        return name

    def _reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self._node("Reshape", x, self._constant(np.array(shape, np.int64)))

    def _scalar(self, value: float) -> str:
        return self._constant(np.float32(value))

    def tile(self, x: str, draws: int) -> str:
        rank = len(self._shapes[x])
        found = self._node("Tile", x, self._constant(np.array([draws, *[1] * rank], np.int64)))
        if x in self._images:
            self._images.add(found)
        return found

    def drop(self, step: Step, x: str, is_folded: bool) -> str:
        rate = step.settings["rate"]
        shape = step.shape
        image = x in self._images
        if image:
            shape = (shape[2], *shape[:2])
        apart = self._reshape(x, (self._draws if is_folded else 1, self._rows, *shape))
        if self._form.fed:
            # Independent numbers have no order: a mask of an image may be read as NCHW.
            keep = step.output
            self.fed[keep] = (self._draws, 1, *shape)
        else:
            rows = 1 if self._tuned else self._rows
            uniform = self._node("RandomUniform", shape=[self._draws, rows, *shape], dtype=self._float)
            kept = self._node("Cast", self._node("GreaterOrEqual", uniform, self._scalar(rate)), to=self._float)
            keep = self._node("Mul", kept, self._scalar(1 / (1 - rate)))
        product = self._node("Mul", apart, keep)
        found = self._reshape(product, (self._draws * self._rows, *shape))
        return self._noted(step, found, image)

    def _noted(self, step: Step, output: str, image: bool = False) -> str:
        self._shapes[output] = step.shape
        if image:
            self._images.add(output)
        return output

    def dense(self, step: Step, x: str) -> str:
        kernel, bias = (self._constant(step.weights[name]) for name in ("kernel", "bias"))
        if len(step.shape) == 1:
            return self._noted(step, self._node("Gemm", x, kernel, bias))
        return self._noted(step, self._node("Add", self._node("MatMul", x, kernel), bias))

    def conv(self, step: Step, x: str) -> str:
        return self._convolve(step, x, step.weights["kernel"].transpose(3, 2, 0, 1), 1)

    def depthwise(self, step: Step, x: str) -> str:
        kernel = step.weights["kernel"].transpose(2, 0, 1)[:, None]
        return self._convolve(step, x, kernel, kernel.shape[0])

    def _convolve(self, step: Step, x: str, kernel: np.ndarray, groups: int) -> str:
        stride, window = step.settings["strides"], kernel.shape[-1]
        pads = [0, 0, 0, 0]
        if step.settings["padding"] == "same":
            first, last = zip(*(_same_padding(size * stride, window, stride) for size in step.shape[:2]), strict=True)
            pads = [*first, *last]
        weights = self._constant(kernel), self._constant(step.weights["bias"])
        found = self._node("Conv", x, *weights, strides=[stride, stride], pads=pads, group=groups)
        return self._noted(step, found, image=True)

    def zero_pad(self, step: Step, x: str) -> str:
        (top, bottom), (left, right) = step.settings["padding"]
        pads = self._constant(np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
        return self._noted(step, self._node("Pad", x, pads), image=True)

    def max_pool(self, step: Step, x: str) -> str:
        return self._noted(step, self._node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), image=True)

    def mean_pool(self, step: Step, x: str) -> str:
        axes = [2, 3] if x in self._images else [1]
        return self._noted(step, self._node("ReduceMean", x, self._constant(np.array(axes, np.int64)), keepdims=0))

    def flatten(self, step: Step, x: str) -> str:
        if x in self._images:
            x = self._node("Transpose", x, perm=[0, 2, 3, 1])
        return self._noted(step, self._reshape(x, (-1, *step.shape)))

    def relu(self, step: Step, x: str) -> str:
        return self._noted(step, self._node("Relu", x), x in self._images)

    def relu6(self, step: Step, x: str) -> str:
        return self._noted(step, self._node("Clip", x, self._scalar(0), self._scalar(6)), x in self._images)

    def sigmoid(self, step: Step, x: str) -> str:
        return self._noted(step, self._node("Sigmoid", x))

    def softmax(self, step: Step, x: str) -> str:
        return self._noted(step, self._node("Softmax", x, axis=-1))

    def add(self, step: Step, x: str, y: str) -> str:
        return self._noted(step, self._node("Add", x, y), x in self._images)

    def layer_norm(self, step: Step, x: str) -> str:
        gamma, beta = (self._constant(step.weights[name]) for name in ("gamma", "beta"))
        found = self._node("LayerNormalization", x, gamma, beta, axis=-1, epsilon=step.settings["epsilon"])
        return self._noted(step, found)

    def split_heads(self, step: Step, x: str) -> str:
        kernel, bias = step.weights["kernel"], step.weights["bias"]
        flat = self._node("MatMul", x, self._constant(kernel.reshape(len(kernel), -1)))
        found = self._node("Add", flat, self._constant(bias.reshape(-1)))
        return self._noted(step, self._reshape(found, (-1, *step.shape)))

    def scores(self, step: Step, query: str, key: str) -> str:
        query = self._node("Transpose", query, perm=[0, 2, 1, 3])
        key = self._node("Transpose", key, perm=[0, 2, 3, 1])
        scaled = self._node("Mul", self._node("MatMul", query, key), self._scalar(step.settings["scale"]))
        return self._noted(step, self._node("Softmax", scaled, axis=-1))

    def attend(self, step: Step, scores: str, value: str) -> str:
        found = self._node("MatMul", scores, self._node("Transpose", value, perm=[0, 2, 1, 3]))
        return self._noted(step, self._node("Transpose", found, perm=[0, 2, 1, 3]))

    def merge_heads(self, step: Step, x: str) -> str:
        kernel = step.weights["kernel"]
        flat = self._reshape(x, (-1, step.shape[0], kernel.shape[0] * kernel.shape[1]))
        product = self._node("MatMul", flat, self._constant(kernel.reshape(-1, kernel.shape[-1])))
        return self._noted(step, self._node("Add", product, self._constant(step.weights["bias"])))
