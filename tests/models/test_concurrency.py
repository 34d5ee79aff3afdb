"""Many threads in one model at once: each gets exactly the answer that it would get alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pytest

from tests.models.artifacts import Artifact

THREADS = 16
# Signatures in turn; seeds, rows and numbers of draws that never repeat together. Draws in one chunk and in several,
# masks kept (seed 0, up to 1000 draws) and drawn.
SIGNATURES = ("serving_default", "mc_predict", "mc_sample", "mc_draws", "mc_sample")
SEEDS = (0, 1, -3, 2**63 - 1)
NUM_SAMPLES = (2, 30, 100, 777, 3000)


@dataclass(frozen=True)
class Call:
    signature: str
    first: int
    rows: int
    arguments: dict[str, int]

    def answer(self, artifact: Artifact, batch: np.ndarray) -> dict[str, bytes]:
        rows = batch[self.first : self.first + self.rows]
        return {k: v.tobytes() for k, v in artifact.answer(self.signature, rows, **self.arguments).items()}


def calls() -> list[Call]:
    made = []
    for number in range(THREADS * 5):
        signature = SIGNATURES[number % len(SIGNATURES)]
        draws = {
            "num_samples": NUM_SAMPLES[number // 3 % len(NUM_SAMPLES)],
            "seed": SEEDS[number // 2 % len(SEEDS)],
        }
        asked = draws if signature in ("mc_sample", "mc_draws") else {}
        made.append(Call(signature, number % 7, 1 + number * 5 % 33, asked))
    return made


@pytest.mark.parametrize("name", ["sonar", "norms"])
def test_16_threads_get_exactly_the_serial_answers(request, name):
    artifact = request.getfixturevalue(name)
    shape = artifact.manifest.inputs[0].shape
    batch = np.random.default_rng(8).uniform(size=(40, *shape)).astype(np.float32)
    asked = calls()
    alone = [call.answer(artifact, batch) for call in asked]
    together = Barrier(THREADS)

    def thread(number: int) -> list[dict[str, bytes]]:
        together.wait()
        return [call.answer(artifact, batch) for call in asked[number::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        for number, found in enumerate(pool.map(thread, range(THREADS))):
            assert found == alone[number::THREADS]
