"""The main path of `dropserve train`: split, fit, evaluate, publish, evaluate what was published."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import keras
import numpy as np

from models.artifact import publish
from models.bento_store import import_artifact
from models.contract import DEFAULT_SEED, Manifest, TrainingData, read_manifest
from models.holdout import KnownRows
from models.novelty import MOST_ROWS
from models.sampling import some
from training import model_report
from training.artifact_answers import Artifact
from training.collapse import is_constant
from training.comparison import Variant, alternatives, fit_variant, place
from training.concrete import RatesVanished, learn_rates
from training.datasets import Dataset
from training.ensemble import single_networks
from training.evaluation import answers, evaluate_artifact, evaluate_constant
from training.model_report import Evidence
from training.plan import Plan
from training.progress import Reporter
from training.splits import Split, split

# Training rows that show whether a network is alive.
LOOKED_AT = 10_000


# How model.keras reads where it has a variance head.
NOISY_OUTPUT = "column 0: the mean; column 1: the standard deviation of the row's noise; both in the target's unit"


@dataclass(frozen=True)
class Published:
    """What one `dropserve train` left behind."""

    folder: Path
    bento_tag: str
    manifest: Manifest
    training_data: TrainingData
    # Columns of a file that are no input, and why.
    ignored: tuple[tuple[str, str], ...]
    # The published network first, then those set beside it.
    variants: list[Variant]
    # Of the published artifact's mean over its draws, on the test rows.
    mc_metrics: dict[str, float]
    # Of the same answer to every row: what a useful network must beat.
    constant_metrics: dict[str, float]
    # How many of the published networks, an ensemble's members, give one answer to all training rows.
    collapsed: int


def train(plan: Plan, reporter: Reporter) -> Published:
    """Carry out the plan; raises ArtifactError where the artifact cannot be written."""
    data = plan.data
    rows = split(data.y, data.task)
    described = training_data(data, rows)
    if plan.concrete:
        plan = learned(plan, rows, reporter)
    plan, chosen, collapsed = fit_alive(plan, rows, reporter)
    beside = [
        fit_variant(name, recipe, data, rows, plan.seed, reporter, plan.members)
        for name, recipe in (alternatives(plan.recipe).items() if plan.compare else ())
    ]
    constant_metrics = evaluate_constant(data, rows.train, rows.test)
    variants = [chosen, *beside]
    evidence = Evidence(
        name=plan.name,
        data=data,
        rows=rows,
        variants=variants,
        constant_metrics=constant_metrics,
        training_data=described,
        num_samples=plan.num_samples,
        seed=DEFAULT_SEED,
        training_seed=plan.seed,
        members=plan.members,
    )
    mc_metrics: dict[str, float] = {}

    def report(folder: Path, manifest: Manifest) -> str:
        # Loaded once: that takes as long as the training of a small network.
        artifact = Artifact(folder, manifest)
        mc_metrics.update(evaluate_artifact(artifact, data, rows.test))
        return model_report.html(evidence, artifact)

    with reporter.step(f"publishing {plan.name}"):
        folder = publish(
            chosen.model,
            name=plan.name,
            repository=plan.repository,
            task=data.task,
            labels=list(data.labels) or None,
            has_noise=plan.recipe.heteroscedastic,
            features=data.features(rows.train),
            examples=data.instances(example_rows(data, rows)),
            holdout=KnownRows(data.tensors(rows.calibration), [data.y[rows.calibration]]),
            calibration_settings=plan.calibration,
            training_inputs=data.tensors(some(rows.train, MOST_ROWS)),
            metrics={"test": chosen.metrics},
            training_data=described,
            training={
                **asdict(plan.recipe),
                "seed": plan.seed,
                "concrete": plan.concrete,
                "members": plan.members,
                **({"network_output": NOISY_OUTPUT} if plan.recipe.heteroscedastic else {}),
                "final_loss": chosen.losses[-1],
                "comparison": [variant.summary() for variant in beside],
            },
            num_samples=plan.num_samples,
            members=plan.members,
            report=report,
        )
        tag = import_artifact(folder)
    return Published(
        folder,
        tag,
        read_manifest(folder),
        described,
        data.ignored,
        [chosen, *beside],
        mc_metrics,
        constant_metrics,
        collapsed,
    )


def fit_alive(plan: Plan, rows: Split, reporter: Reporter) -> tuple[Plan, Variant, int]:
    """The plan's network, with the next seeds instead where it, or a member of it, answers the same to every row.

    Returns the plan with the seed that was used, the network, and how many of its members are collapsed: of
    `plan.tries` seeds the first without any, else the last of those with the fewest.
    """
    found: tuple[Plan, Variant, int] | None = None
    for attempt in range(plan.tries):
        # An ensemble's members have the seeds that follow its own.
        seed = (plan.seed + attempt * plan.members) % 2**32
        chosen = fit_variant(place(plan.recipe), plan.recipe, plan.data, rows, seed, reporter, plan.members)
        collapsed = count_collapsed(chosen.model, plan, some(rows.train, LOOKED_AT))
        if found is None or collapsed <= found[2]:
            found = replace(plan, seed=seed), chosen, collapsed
        if not collapsed:
            break
    assert found is not None
    return found


def count_collapsed(model: keras.Model, plan: Plan, rows: np.ndarray) -> int:
    """Of the network, or of each member of the ensemble: the mean of a dead one and of live ones looks alive."""
    networks = single_networks(model, plan.members) if plan.members > 1 else [model]
    return sum(is_constant(answers(network, plan.data, rows), plan.data, rows) for network in networks)


def learned(plan: Plan, rows: Split, reporter: Reporter) -> Plan:
    """The plan with the rates that Concrete Dropout learns on the training rows; raises RatesVanished."""
    with reporter.epochs(f"{plan.data.name}, learning the rates", plan.recipe.epochs) as on_epoch:
        recipe = learn_rates(plan.data, rows.train, plan.recipe, seed=plan.seed, begin=plan.begin, on_epoch=on_epoch)
    if not recipe.is_stochastic:
        raise RatesVanished(plan.data.name)
    return replace(plan, recipe=recipe)


def training_data(data: Dataset, rows: Split) -> TrainingData:
    return TrainingData(
        name=data.name,
        sha256=data.sha256,
        rows=len(data.x),
        train_rows=len(rows.train),
        calibration_rows=len(rows.calibration),
        test_rows=len(rows.test),
        attribution=data.attribution,
    )


def example_rows(data: Dataset, rows: Split) -> np.ndarray:
    """The first two test rows, of two classes where there are classes: examples whose answers differ."""
    first = rows.test[0]
    if data.task == "regression":
        return rows.test[:2]
    second = rows.test[np.flatnonzero(data.y[rows.test] != data.y[first])[0]]
    return np.array([first, second])
