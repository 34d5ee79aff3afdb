"""Calibration: what held-out rows say of the draws that are served, fitted at packaging and applied in the graph.

calibration = calibrate(engine, rows, CalibrationSettings())   # from then on the engine's heads apply it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
import tensorflow as tf

from models import abstention, conformal, noise, novelty, temperature
from models.calibration_settings import CalibrationSettings
from models.contract import (
    NOVELTY,
    REFERENCE_LEVELS,
    Abstention,
    Calibration,
    ConformalScores,
    Noise,
    OutputCalibration,
    TargetNoises,
    Temperature,
    UncertaintyReference,
)
from models.engine import Engine
from models.heads import Head
from models.holdout import Array, NotFinite, Rows
from models.novelty import Novelty
from models.sampling import some

# Arrays [N, ...] by input name.
Inputs = Mapping[str, Array]

# Numbers in all draws of one row of several places, beyond which no temperature is looked for: 64 MB.
MOST_NUMBERS = 2**24
# Numbers a row, beyond which they are no targets of their own (an image, say): each is fitted by itself.
MOST_TARGETS = 100


def calibrate(
    engine: Engine, rows: Rows, settings: CalibrationSettings, known_inputs: Inputs | None = None
) -> Calibration:
    """Fit every output on the rows, with the artifact's own draws; from now on the engine applies it.

    known_inputs: rows that the network was trained on, from which novelty is measured; else half of `rows` are taken.
    What an output's shape or the rows do not allow stays off, and `warnings` says so.
    """
    settings.check_task(any(head.is_classification for head in engine.heads))
    settings.check_choice(any(_is_one_choice(head) for head in engine.heads))
    engine.novelty, reason = _novelty(engine, rows, known_inputs)
    fitted = [_fitted(engine, head, rows, number) for number, head in enumerate(engine.heads)]
    if reason is not None:
        fitted = [_warned(head, reason) for head in fitted]
    engine.calibrate(fitted)
    answers = _answers(engine, rows)
    judged = [_judged(head, answers, target, settings) for head, target in zip(engine.heads, rows.targets, strict=True)]
    engine.calibrate([_referred(head, answers) for head in judged])
    return Calibration(
        rows=rows.count, coverage=settings.coverage, outputs={head.output.name: _known(head) for head in engine.heads}
    )


def _novelty(engine: Engine, rows: Rows, known_inputs: Inputs | None) -> tuple[Novelty | None, str | None]:
    """The distance from the rows that the network was trained on, else from every other row of those held out.

    Or why there is none: a network may have answers to rows of whose features some are infinite, as a logarithm of 0.
    """
    if known_inputs is None:
        known_inputs = {name: array[::2] for name, array in rows.inputs.items()}
    known = replace(rows, inputs={name: known_inputs[name] for name in rows.inputs}, targets=[])
    if known.count < novelty.MIN_ROWS:
        return None, None
    try:
        found = known.some(novelty.MOST_ROWS).run(engine.features, engine.input_specs, novelty.MOST_FEATURES)
        if not found:
            return None, None
        distance = Novelty(found["features"])
        rows.run(
            lambda inputs: {NOVELTY: distance.of(engine.features(inputs)["features"])},
            engine.input_specs,
            novelty.MOST_FEATURES,
        )
    except NotFinite:
        return None, "no novelty: some rows have features, before the first stochastic layer, that are not finite"
    return distance, None


def _known(head: Head) -> OutputCalibration:
    return head.calibration if head.calibration is not None else OutputCalibration()


def _warned(head: Head, warning: str) -> Head:
    known = _known(head)
    return replace(head, calibration=known.model_copy(update={"warnings": [*known.warnings, warning]}))


def _is_one_choice(head: Head) -> bool:
    """Whether a row has one class: no sequences or maps of them."""
    return head.is_classification and len(head.output.shape) == 1


def _is_one_value(head: Head) -> bool:
    """Whether a row has one number."""
    return not head.is_classification and not head.output.shape


def _has_targets(head: Head) -> bool:
    """Whether a row has several numbers, each a target of its own."""
    shape = head.output.shape
    return not head.is_classification and len(shape) == 1 and shape[0] is not None and shape[0] <= MOST_TARGETS


def _can_be_judged(head: Head) -> bool:
    """Whether an answer can have a set or intervals."""
    return _is_one_choice(head) or _is_one_value(head) or _has_targets(head)


def _numbers(engine: Engine, rows: Rows) -> int:
    """Numbers in all draws of one row."""
    longest = max((size for array in rows.inputs.values() for size in array.shape[1:]), default=1)
    sizes = [prod(longest if size is None else size for size in head.output.shape) for head in engine.heads]
    return engine.num_samples * sum(sizes)


def _answers(engine: Engine, rows: Rows) -> dict[str, Array]:
    """The served answers of every row: what is judged of them, and what has one number a row."""
    judged = {
        f"{head.output.prefix}{name}"
        for head in engine.heads
        if _known(head).fit is not None and _can_be_judged(head)
        for name in ("probabilities", "mean", "std")
    }

    def answers(inputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        found = engine.default(inputs)
        return {name: values for name, values in found.items() if name in judged or values.shape.rank == 1}

    return rows.run(answers, engine.input_specs, _numbers(engine, rows))


def _fitted(engine: Engine, head: Head, rows: Rows, number: int) -> Head:
    """The head, which is the engine's of this number, with what is fitted on its draws."""
    found: Temperature | Noise | None
    reason: str | None
    if _is_one_choice(head):
        used = _usable(engine, head, rows)
        found, reason = temperature.fit(_draws(engine, head, used)["draws"], used.targets[number])
    elif head.is_classification:
        return _fitted_to_places(engine, head, rows, rows.targets[number])
    elif _is_one_value(head):
        used = _usable(engine, head, rows)
        draws = _draws(engine, head, used)
        found, reason = noise.fit(draws["draws"], draws.get("aleatoric_draws"), used.targets[number])
    elif _has_targets(head):
        return _fitted_to_targets(engine, head, rows, number)
    else:
        found, reason = None, f"not calibrated: {_several(head)}; at most {MOST_TARGETS} along one fixed axis wanted"
    known = OutputCalibration(fit=found, warnings=[] if reason is None else [reason])
    return _with_noise(replace(head, calibration=known))


def _fitted_to_targets(engine: Engine, head: Head, rows: Rows, number: int) -> Head:
    """The head with the noise of each number of a row."""
    used = _usable(engine, head, rows)
    found, reasons = noise.fit_targets(_draws(engine, head, used)["draws"], used.targets[number])
    warnings = [f"no abstention: {_several(head)}", *reasons]
    return _with_noise(replace(head, calibration=OutputCalibration(fit=found, warnings=warnings)))


def _several(head: Head) -> str:
    return f"a row has several numbers (shape {head.output.shape})"


def _with_noise(head: Head) -> Head:
    """The head, whose output says whether its noise is known."""
    if not isinstance(_known(head).fit, Noise | TargetNoises):
        return head
    return replace(head, output=head.output.model_copy(update={"has_aleatoric": True}))


def _fitted_to_places(engine: Engine, head: Head, rows: Rows, target: Array) -> Head:
    """The head with a temperature for all places of a row: of a large map some of them, at random, show it.

    target: [N, ...], the classes of the places.
    """
    warnings = [f"neither prediction sets nor abstention: a row has several classes (shape {head.output.shape})"]
    numbers, classes = _numbers(engine, rows), len(head.output.labels or "1")
    if numbers > MOST_NUMBERS:
        warnings.append(
            f"temperature stays off: {engine.num_samples} draws of a row are {numbers:,} numbers, at most "
            f"{MOST_NUMBERS:,} wanted"
        )
        return replace(head, calibration=OutputCalibration(warnings=warnings))
    flat = target.reshape(len(target), -1)
    places = some(np.arange(flat.shape[1]), temperature.usable_places(engine.num_samples, classes))
    used = temperature.usable_rows((rows.count, engine.num_samples, len(places), classes))

    def draws(inputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        found = engine.served_draws(inputs)[head.output.prefix + "draws"]
        by_place = tf.reshape(found, [-1, engine.num_samples, flat.shape[1], classes])
        return {"draws": tf.gather(by_place, places, axis=2)}

    drawn = rows.some(used).run(draws, engine.input_specs, numbers)["draws"]
    fit, reason = temperature.fit(drawn, some(flat, used)[:, places])
    warnings += [] if reason is None else [reason]
    return replace(head, calibration=OutputCalibration(fit=fit, warnings=warnings))


def _usable(engine: Engine, head: Head, rows: Rows) -> Rows:
    """As many of the rows as are used of one output's draws."""
    numbers = prod(size or 1 for size in head.output.shape)
    return rows.some(temperature.usable_rows((rows.count, engine.num_samples, numbers)))


def _draws(engine: Engine, head: Head, rows: Rows) -> dict[str, Array]:
    """The draws of one output, [rows, T, ...]."""
    prefix = head.output.prefix
    names = ("draws", "aleatoric_draws")

    def draws(inputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        found = engine.served_draws(inputs)
        return {name: found[prefix + name] for name in names if prefix + name in found}

    return rows.run(draws, engine.input_specs, _numbers(engine, rows))


def _judged(head: Head, answers: dict[str, Array], target: Array, settings: CalibrationSettings) -> Head:
    """The head with its prediction sets and its abstention, from the answers that are served with the fit."""
    known = _known(head)
    if known.fit is None or not _can_be_judged(head):
        return head
    if not head.is_classification:
        mean, std = answers[head.output.prefix + "mean"], answers[head.output.prefix + "std"]
        scores = conformal.of_values(mean, std, target)
        rule = abstention.of_std(std) if _is_one_value(head) else None
        return _with(head, scores, rule, settings.coverage)
    probabilities = answers[head.output.prefix + "probabilities"]
    scores = conformal.of_classes(probabilities, target, settings.sets)
    rule, reason = _rule(probabilities.max(axis=1), probabilities.argmax(axis=1) == target, settings)
    if reason is not None:
        head = _warned(head, reason)
    return _with(head, scores, rule, settings.coverage)


def _rule(confidence: Array, right: Array, settings: CalibrationSettings) -> tuple[Abstention, str | None]:
    if settings.max_error is not None:
        return abstention.of_max_error(confidence, right, settings.max_error, settings.confidence)
    if settings.cost_ratio is not None:
        return abstention.of_cost_ratio(confidence, right, settings.cost_ratio), None
    return abstention.of_confidence(confidence, right), None


def _with(head: Head, scores: ConformalScores, rule: Abstention | None, coverage: float) -> Head:
    known = _known(head)
    few = conformal.too_few(scores, coverage, head.output.labels or [])
    warnings = known.warnings + ([] if few is None else [few])
    update = {"conformal": scores, "abstention": rule, "warnings": warnings}
    return replace(head, calibration=known.model_copy(update=update), coverage=coverage)


def _referred(head: Head, answers: dict[str, Array]) -> Head:
    """The head with the quantiles of its statistics: what a server compares its traffic with."""
    prefix = head.output.prefix
    names = {
        name: quantiles(answers[prefix + name])
        for name in UncertaintyReference.model_fields
        if prefix + name in answers and answers[prefix + name].ndim == 1
    }
    rule = _known(head).abstention
    share = None if rule is None else 1 - rule.answered_share
    reference = UncertaintyReference(**names, abstention_share=share)
    return replace(head, calibration=_known(head).model_copy(update={"reference": reference}))


def quantiles(values: Array) -> list[float]:
    """At REFERENCE_LEVELS, ascending."""
    found = np.quantile(values.astype(np.float64), REFERENCE_LEVELS)
    return np.maximum.accumulate(found).tolist()
