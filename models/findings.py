"""What a calibration found, in sentences for the person who packages."""

from __future__ import annotations

from models.contract import Abstention, Calibration, Noise, OutputCalibration, TargetNoises


def sentences(calibration: Calibration) -> list[str]:
    """One line a finding, one a warning; with several outputs each begins with the output's name."""
    several = len(calibration.outputs) > 1
    found = []
    for name, output in calibration.outputs.items():
        lead = f"{name}: " if several else ""
        found += [lead + sentence for sentence in [*_fit(output), *_sets(output, calibration), *_abstention(output)]]
        found += [f"{lead}warning: {warning}" for warning in output.warnings]
    return found


def _fit(output: OutputCalibration) -> list[str]:
    fit = output.fit
    if isinstance(fit, Noise):
        return [_noise(fit)]
    if isinstance(fit, TargetNoises):
        return [f"number {place}: {_noise(noise)}" for place, noise in enumerate(fit.targets)]
    if fit is None or fit.value == 1.0:
        return []
    return [
        f"temperature {fit.value:.3g}: NLL {fit.nll_before:.4g} -> {fit.nll_after:.4g}, "
        f"calibration error {fit.ece_before:.3g} -> {fit.ece_after:.3g} (cross-validated)"
    ]


def _noise(noise: Noise) -> str:
    what = f"noise {noise.std:.4g}" if noise.std is not None else f"noise {noise.scale:.3g} times the network's own"
    return f"{what}: NLL {noise.nll_before:.4g} -> {noise.nll_after:.4g} (cross-validated)"


def _sets(output: OutputCalibration, calibration: Calibration) -> list[str]:
    scores = output.conformal
    if scores is None:
        return []
    if scores.kind == "interval":
        each = f" of each of {len(scores.scores)} numbers by itself" if len(scores.scores) > 1 else ""
        found = len(scores.scores[0])
        return [f"intervals{each} from {found:,} rows, at a coverage of {100 * calibration.coverage:g}%"]
    kind = f"{scores.kind.upper()}, by class" if scores.by_class else scores.kind.upper()
    rows = sum(len(part) for part in scores.scores)
    return [f"prediction sets ({kind}) from {rows:,} rows, at a coverage of {100 * calibration.coverage:g}%"]


def _abstention(output: OutputCalibration) -> list[str]:
    rule = output.abstention
    if rule is None:
        return []
    return [f"{rule.answered_share:.1%} answered, the rest withheld: {_condition(rule)}{_promise(rule)}"]


def _condition(rule: Abstention) -> str:
    below = "below" if rule.statistic == "confidence" else "above"
    return f"{rule.statistic} {below} {rule.threshold:.4g}"


def _promise(rule: Abstention) -> str:
    if rule.max_error is not None:
        return f"; of what is answered at most {rule.max_error:.3g} is wrong, with confidence {rule.confidence:.3g}"
    return "" if rule.error is None else f"; {rule.error:.1%} of what is answered was wrong"
