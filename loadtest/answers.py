"""What an answer must be: its form, and what holds between its numbers whatever the model.

A row has one class or one number, or several places with one for each: then the values are nested lists over them.
The memory keeps the first answer of each (row, num_samples, seed): a row's answer depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

# Probabilities come from float32 arithmetic.
SUM_TOLERANCE = 1e-5
# Matrix products block differently with the batch: two answers to one row agree to this, relative above 1.
SAME_TOLERANCE = 2e-6
# A distance in features that are scaled by the inverse of their covariance: it magnifies their own last digits.
NOVELTY_TOLERANCE = 2e-5
# An identity between float32 numbers: absolute, and relative as well.
IDENTITY_TOLERANCE = 1e-5


class AnswerError(Exception):
    """An answer is wrong. `str()` says what was found and what was wanted."""


def flat(value: Any) -> Iterator[Any]:
    """What stands in nested lists, in order; what is no list itself."""
    if isinstance(value, list):
        for entry in value:
            yield from flat(entry)
    else:
        yield value


def shape(value: Any) -> tuple[int, ...]:
    """Of nested lists; () of what is no list. Raises AnswerError where they are uneven."""
    if not isinstance(value, list):
        return ()
    inner = {shape(entry) for entry in value}
    if len(inner) > 1:
        raise AnswerError(f"lists of the shapes {sorted(inner)} in one, wanted the same")
    return (len(value), *(inner.pop() if inner else ()))


def _numbers(least: float = -math.inf, most: float = math.inf) -> AfterValidator:
    """A finite number within the bounds, or nested lists of them."""

    def check(value: Any) -> Any:
        for number in flat(value):
            # A truth value is no number.
            is_good = type(number) in (int, float) and math.isfinite(number) and least <= number <= most
            if not is_good:
                raise ValueError(f"{number!r} found, a finite number from {least:g} to {most:g} wanted")
        return value

    return AfterValidator(check)


def _texts(value: Any) -> Any:
    wrong = [text for text in flat(value) if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} found, a text wanted")
    return value


def _ends(value: Any) -> Any:
    for end in flat(value):
        if end is not None and not (type(end) in (int, float) and math.isfinite(end)):
            raise ValueError(f"{end!r} found, a finite number or null wanted")
    return value


NotNegative = Annotated[FiniteFloat, Field(ge=0)]
# Of each place.
Label = Annotated[Any, AfterValidator(_texts)]
Probability = Annotated[Any, _numbers(0, 1)]
Values = Annotated[Any, _numbers()]
Spread = Annotated[Any, _numbers(0)]
# null: no end, where there are too few calibration rows.
End = Annotated[Any, AfterValidator(_ends)]


class _Form(BaseModel):
    # A later server may add fields; `strict`: a number in quotes is no number.
    model_config = ConfigDict(extra="allow", strict=True)


class _Calibrated(_Form):
    """What answers of calibrated models have beside."""

    abstain: bool | None = None
    novelty: NotNegative | None = None


class Model(_Form):
    name: str
    version: str


class PredictAnswer(_Form):
    model: Model
    predictions: list[dict[str, Any]]


class UncertaintyAnswer(PredictAnswer):
    seed: int


class ClassPrediction(_Form):
    label: Label
    probabilities: dict[str, Probability]

    def check(self) -> None:
        _check_places({"label": self.label, **{f"probabilities.{name}": p for name, p in self.probabilities.items()}})
        names = list(self.probabilities)
        for label, own in zip(flat(self.label), self._by_place(), strict=True):
            total = math.fsum(own)
            if abs(total - 1) > SUM_TOLERANCE:
                raise AnswerError(f"probabilities sum to {total:.7f}, wanted 1")
            if label not in names or own[names.index(label)] != max(own):
                raise AnswerError(f"label {label!r} is not the one with the highest probability")

    def _by_place(self) -> list[tuple[float, ...]]:
        """Each place's probabilities, in the labels' order."""
        return list(zip(*map(flat, self.probabilities.values()), strict=True))


class SampledClass(ClassPrediction, _Calibrated):
    std: dict[str, Spread]
    standard_error: dict[str, Spread]
    predictive_entropy: Spread
    expected_entropy: Spread
    mutual_information: Spread
    # Any of the labels, or none of them: each is judged by itself.
    prediction_set: list[str] | None = None

    def check_draws(self, num_samples: int) -> None:
        self.check()
        if self.prediction_set is not None:
            wanted = [label for label in self.probabilities if label in self.prediction_set]
            if self.prediction_set != wanted:
                raise AnswerError(f"prediction_set is {self.prediction_set}, wanted labels in their order, each once")
        names = ("predictive_entropy", "expected_entropy", "mutual_information")
        _check_places({"label": self.label, **{name: getattr(self, name) for name in names}})
        entropies = zip(*(flat(getattr(self, name)) for name in names), strict=True)
        for own, (predictive, expected, mutual) in zip(self._by_place(), entropies, strict=True):
            _check_same("predictive_entropy", predictive, _entropy(own))
            _check_same("mutual_information", mutual, predictive - expected)
        for label, std in self.std.items():
            _check_places({"label": self.label, f"std of {label}": std})
            error = self.standard_error.get(label, math.nan)
            _check_errors(f"standard_error of {label}", error, std, num_samples)


class ValuePrediction(_Form):
    mean: Values

    def check(self) -> None:
        """A finite number may be any number."""


class Interval(_Form):
    lower: End
    upper: End
    # Not in answers of the tensor protocols.
    coverage: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None


class SampledValue(ValuePrediction, _Calibrated):
    epistemic_std: Spread
    standard_error: Spread
    aleatoric_std: Spread | None = None
    std: Spread | None = None
    interval: Interval | None = None

    def check_draws(self, num_samples: int) -> None:
        self._check_interval()
        self._check_std()
        _check_places({"mean": self.mean, "epistemic_std": self.epistemic_std})
        _check_errors("standard_error", self.standard_error, self.epistemic_std, num_samples)

    def _check_interval(self) -> None:
        if self.interval is None:
            return
        parts = {"interval.lower": self.interval.lower, "interval.upper": self.interval.upper, "mean": self.mean}
        _check_places(parts)
        for lower, upper, mean in zip(*map(flat, parts.values()), strict=True):
            if (lower is None) != (upper is None):
                raise AnswerError(f"interval has one end, {lower} to {upper}, wanted both or none")
            if lower is not None and not lower <= mean <= upper:
                raise AnswerError(f"interval is {lower} to {upper}, wanted the mean in it, {mean}")

    def _check_std(self) -> None:
        """Variances add."""
        if (self.std is None) != (self.aleatoric_std is None):
            raise AnswerError("one of std and aleatoric_std, wanted both or none")
        if self.std is None or self.aleatoric_std is None:
            return
        parts = {"std": self.std, "epistemic_std": self.epistemic_std, "aleatoric_std": self.aleatoric_std}
        _check_places(parts)
        for found, epistemic, aleatoric in zip(*map(flat, parts.values()), strict=True):
            _check_same("std", found, math.hypot(epistemic, aleatoric))


class Draws(_Form):
    """What the draws of a row were, whatever its outputs."""

    num_samples: int
    converged: bool


class Memory:
    """Checks answers, each by itself and against what was answered before."""

    def __init__(self) -> None:
        self._first: dict[tuple, dict[str, Any]] = {}

    def check_predict(self, body: bytes, rows: list[int], model: str = "") -> None:
        """Raise AnswerError unless `body` is a right answer of `/predict` to the rows with these numbers.

        model: whose answer it must be; "": any one's.
        """
        answer = _parsed(PredictAnswer.model_validate_json, body)
        _check_model(answer, model)
        for prediction in answer.predictions:
            for output in _outputs(prediction):
                form = ValuePrediction if "mean" in output else ClassPrediction
                _parsed(form.model_validate, output).check()
        self._compare(answer, rows, "predict")

    def check_uncertainty(
        self, body: bytes, rows: list[int], num_samples: int | None, seed: int | None, model: str = ""
    ) -> None:
        """Raise AnswerError unless `body` is a right answer of `/uncertainty`; None: not sent, the model's default."""
        answer = _parsed(UncertaintyAnswer.model_validate_json, body)
        _check_model(answer, model)
        if seed is not None and answer.seed != seed:
            raise AnswerError(f"seed is {answer.seed}, wanted {seed}")
        for prediction in answer.predictions:
            draws = _parsed(Draws.model_validate, prediction)
            if num_samples is not None and draws.num_samples != num_samples:
                raise AnswerError(f"num_samples is {draws.num_samples}, wanted {num_samples}")
            for output in _outputs(prediction):
                form = SampledValue if "mean" in output else SampledClass
                _parsed(form.model_validate, output).check_draws(draws.num_samples)
        self._compare(answer, rows, "uncertainty", num_samples, seed)

    def check_draws(
        self, model: str, predictions: list[dict[str, Any]], rows: list[int], num_samples: int, seed: int
    ) -> None:
        """The same for answers of the tensor protocols, which say neither their version nor their draws: whichever
        of the protocols was asked, the answer is the same.
        """
        for prediction in predictions:
            form = SampledValue if "mean" in prediction else SampledClass
            _parsed(form.model_validate, prediction).check_draws(num_samples)
        answer = PredictAnswer(model=Model(name=model, version="any"), predictions=predictions)
        self._compare(answer, rows, "tensors", num_samples, seed)

    def _compare(self, answer: PredictAnswer, rows: list[int], *question: str | int | None) -> None:
        if len(answer.predictions) != len(rows):
            raise AnswerError(f"{len(answer.predictions)} predictions, wanted {len(rows)}, one for each row")
        for row, found in zip(rows, answer.predictions, strict=True):
            first = self._first.setdefault((answer.model.name, answer.model.version, row, *question), found)
            difference = _difference(first, found)
            if difference is not None:
                raise AnswerError(f"row {row} was answered differently before: {difference}")


def _check_model(answer: PredictAnswer, wanted: str) -> None:
    if wanted and answer.model.name != wanted:
        raise AnswerError(f"model {answer.model.name!r} answered, wanted {wanted!r}")


def _parsed(validate: Any, content: Any) -> Any:
    try:
        return validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AnswerError(f"answer has another form, at {where or 'the top'}: {first['msg']}") from error


def _outputs(prediction: dict[str, Any]) -> list[Any]:
    """The prediction itself, or with several outputs the prediction of each."""
    groups = [value for value in prediction.values() if isinstance(value, dict)]
    return [prediction] if {"probabilities", "mean"} & prediction.keys() or not groups else groups


def _check_places(values: dict[str, Any]) -> None:
    """All of them have the same places."""
    shapes = {name: shape(value) for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        shown = ", ".join(f"{name} {found}" for name, found in shapes.items())
        raise AnswerError(f"shapes {shown}: wanted the same places in all")


def _check_errors(name: str, errors: Any, stds: Any, num_samples: int) -> None:
    """Standard errors are of so many draws with these deviations."""
    _check_places({name: errors, "std": stds})
    for found, std in zip(flat(errors), flat(stds), strict=True):
        _check_same(name, found, std / math.sqrt(num_samples))


def _entropy(probabilities: tuple[float, ...]) -> float:
    """In nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def _check_same(name: str, found: float, wanted: float) -> None:
    # Written so that NaN fails.
    if not abs(found - wanted) <= IDENTITY_TOLERANCE * (1 + abs(wanted)):
        raise AnswerError(f"{name} is {found:.7f}, wanted {wanted:.7f} by the answer's other numbers")


def _difference(first: Any, found: Any, where: str = "") -> str | None:
    """Where two answers differ by more than rounding, in words; None where they do not."""
    match first, found:
        case dict(), dict():
            if first.keys() != found.keys():
                return f"{where or 'fields'} {sorted(first.keys() ^ found.keys())} only once"
            parts = [(first[key], found[key], f"{where}.{key}".lstrip(".")) for key in first]
        case list(), list():
            if len(first) != len(found):
                return f"{where} has {len(found)} values, {len(first)} before"
            parts = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(first, found, strict=True))]
        case (float() | int(), float() | int()) if not isinstance(first, bool):
            tolerance = NOVELTY_TOLERANCE if where.rpartition(".")[2] == "novelty" else SAME_TOLERANCE
            same = abs(first - found) <= tolerance * max(1.0, abs(first), abs(found))
            return None if same else f"{where} is {found!r}, {first!r} before"
        case _:
            return None if first == found else f"{where} is {found!r}, {first!r} before"
    return next((text for text in (_difference(*part) for part in parts) if text is not None), None)
