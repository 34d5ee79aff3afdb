"""The micro-batcher over a real artifact: what is mixed, what is refused, what waits for what."""

import asyncio
import dataclasses
import os
import sys
import threading
import time
from typing import Any

import keras
import numpy as np
import pytest

from models.artifact import publish
from serving.batcher import DRAWS_NICENESS, Batcher, Call
from serving.errors import DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving.graph import Arrays
from serving.metrics import Metrics
from serving.runtime import Cost, Model
from serving.settings import Settings
from tests.models.networks import places_net

pytestmark = pytest.mark.alone


@dataclasses.dataclass(eq=False)
class CountedModel(Model):
    """The real model, with a count of the rows of each call."""

    calls: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    threads: list[threading.Thread] = dataclasses.field(default_factory=list)

    def run(self, function, arguments) -> Arrays:
        outputs = super().run(function, arguments)
        self.threads.append(threading.current_thread())
        self.calls.append((function, len(next(iter(outputs.values())))))
        return outputs


@pytest.fixture(scope="module")
def model(trained) -> CountedModel:
    return CountedModel.load(trained.folder)


@pytest.fixture(autouse=True)
def forget_calls(model):
    model.calls.clear()


EXAMPLE_STEPS = 10


@pytest.fixture(scope="module")
def signals(tmp_path_factory) -> CountedModel:
    """A model of sequences of any length, measured with ten steps."""
    steps = keras.Input((None, 1), name="steps")
    hidden = keras.layers.Dropout(0.5)(keras.layers.Conv1D(4, 3, padding="same", activation="relu")(steps))
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    network = keras.Model(steps, keras.layers.Dense(2, activation="softmax", name="kind")(hidden))
    examples = [[[0.5]] * EXAMPLE_STEPS]
    repository = tmp_path_factory.mktemp("signals")
    return CountedModel.load(publish(network, name="signals", repository=repository, examples=examples))


def signals_of(rows: int, steps: int) -> Arrays:
    return {"steps": np.random.default_rng(steps).normal(size=(rows, steps, 1)).astype(np.float32)}


def batcher_of(**settings: Any) -> Batcher:
    chosen = Settings(**settings)
    return Batcher(chosen, Metrics(chosen.drift_window_rows))


def predict(model: Model) -> Call:
    return Call(model, "serving_default")


def draw(model: Model, num_samples: int, seed: int = 0) -> Call:
    return Call(model, "mc_sample", (("num_samples", num_samples), ("seed", seed)), num_samples)


def rows_of(trained, start: int, stop: int) -> Arrays:
    return {"features": trained.rows[start:stop]}


def test_requests_of_one_turn_share_a_call_and_get_their_own_rows(model, trained):
    async def main():
        batcher = batcher_of()
        work = [batcher.submit(predict(model), rows_of(trained, index, index + 1 + index % 3)) for index in range(60)]
        answers = await asyncio.gather(*work)
        batcher.close()
        return answers

    answers = asyncio.run(main())
    assert model.calls == [("serving_default", sum(1 + index % 3 for index in range(60)))]
    alone = model.run("serving_default", {"features": trained.rows})["probabilities"]
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(answer["probabilities"], alone[index : index + 1 + index % 3], atol=1e-6)


def test_requests_of_turns_that_follow_each_other_share_a_call(model, trained):
    async def main():
        batcher = batcher_of()
        counts = []
        # More than once: where the machine stops this process for a while, a call goes without the rest.
        for _ in range(20):
            model.calls.clear()
            work = []
            for index in range(10):
                work.append(batcher.submit(predict(model), rows_of(trained, index, index + 1)))
                await asyncio.sleep(0)
            await asyncio.gather(*work)
            counts.append(len(model.calls))
        batcher.close()
        return counts

    assert 1 in asyncio.run(main())


def test_requests_without_end_make_none_wait_for_long(model, trained):
    async def main():
        batcher = batcher_of(max_queue=10**6)
        asked, answered = 0, 0

        def count(_: Any) -> None:
            nonlocal answered
            answered += 1

        # So many calls, and not so long: a machine that stops this process for a while lets no requests come either.
        limit = time.monotonic() + 10
        while len(model.calls) < 20 and time.monotonic() < limit:
            batcher.submit(predict(model), rows_of(trained, 0, 1)).add_done_callback(count)
            asked += 1
            await asyncio.sleep(0)
        found = asked, answered, len(model.calls)
        while batcher.open_requests:
            await asyncio.sleep(0.001)
        batcher.close()
        return found

    asked, answered, calls = asyncio.run(main())
    # A call every GATHER_S and its own time: most of the requests had theirs while others were still coming.
    assert answered > asked / 2
    assert 3 < calls < asked / 3


def test_a_full_call_waits_for_no_more_requests(model, trained):
    async def main():
        batcher = batcher_of(batch_rows=4)
        work = []
        for index in range(20):
            work.append(batcher.submit(predict(model), rows_of(trained, index, index + 1)))
            await asyncio.sleep(0)
        made = len(model.calls)
        await asyncio.gather(*work)
        batcher.close()
        return made

    assert asyncio.run(main()) >= 4
    assert sum(rows for _, rows in model.calls) == 20
    assert max(rows for _, rows in model.calls) == 4


@pytest.mark.parametrize(
    ("milliseconds", "measured", "of_100_rows"),
    [
        # Few rows cost more each: a line through them said 3 ms where 64 take 1.1, and gave them to a thread.
        pytest.param({1: 0.3, 16: 0.5, 64: 1.1}, [1, 16, 64], 1.55, id="small"),
        pytest.param({1: 1.0, 16: 8.5}, [1, 16], 50.5, id="large"),
    ],
)
def test_what_a_call_costs_is_measured_where_batches_are_large(trained, milliseconds, measured, of_100_rows):
    sizes = []

    class TimedModel(Model):
        """The real model on a machine whose calls of so many rows always take so long."""

        def _measure(self, function, arguments) -> float:
            rows = len(arguments["features"])
            if function == "mc_predict":
                sizes.append(rows)
            return milliseconds[rows] / 1000

    model = TimedModel.load(trained.folder)
    assert sizes == measured
    draws = model.manifest.num_samples
    assert model.costs["mc_predict"].seconds(100 * draws) == pytest.approx(of_100_rows / 1000)


def test_requests_with_other_settings_do_not_share_a_call(model, trained):
    asked = [(50, 0), (50, 1), (60, 0), (50, 0), (50, 1)]

    async def main():
        batcher = batcher_of()
        work = [batcher.submit(draw(model, *settings), rows_of(trained, 3, 5)) for settings in asked]
        answers = await asyncio.gather(*work)
        batcher.close()
        return answers

    answers = asyncio.run(main())
    assert sorted(rows for _, rows in model.calls) == [2, 4, 4]
    for (num_samples, seed), answer in zip(asked, answers, strict=True):
        arguments = {**rows_of(trained, 3, 5), "num_samples": num_samples, "seed": seed}
        alone = model.run("mc_sample", arguments)
        for name, values in alone.items():
            np.testing.assert_allclose(answer[name], values, atol=1e-6)


def test_of_large_maps_few_rows_have_their_draws_in_memory_at_once(tmp_path):
    """1,000 draws of a map of 64 x 64 places with 8 classes are 128 MiB, and the graph has them three times or so."""
    folder = publish(places_net(8, (64, 64, 3)), name="map", repository=tmp_path, num_samples=20)
    maps = CountedModel.load(folder)
    maps.calls.clear()
    x = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)

    async def main():
        batcher = batcher_of(inline_ms=0)
        answer = await batcher.submit(draw(maps, 1_000), {"x": x})
        batcher.close()
        return answer

    answer = asyncio.run(main())
    assert [rows for _, rows in maps.calls] == [2, 1]
    assert answer["probabilities"].shape == (3, 64, 64, 8)
    # Draws that quantiles are not read from are not kept; of fewer draws more rows fit.
    assert [maps.call_rows({"x": x}, draws) for draws in (20, 1_000, 5_000)] == [102, 2, 2]


@pytest.mark.parametrize("inline_ms", [0, 1e6], ids=["on the thread", "on the event loop"])
def test_a_large_request_is_cut_and_put_together_again(model, trained, inline_ms):
    async def main():
        batcher = batcher_of(batch_rows=30, batch_row_draws=1000, inline_ms=inline_ms)
        answers = await asyncio.gather(
            batcher.submit(predict(model), rows_of(trained, 0, 208)),
            batcher.submit(draw(model, 100), rows_of(trained, 0, 25)),
            batcher.submit(draw(model, 5000), rows_of(trained, 0, 2)),
        )
        assert batcher.open_requests == 0
        batcher.close()
        return answers

    predicted, drawn, long_drawn = asyncio.run(main())
    calls = list(model.calls)
    assert [rows for function, rows in calls if function == "serving_default"] == [30] * 6 + [28]
    assert sorted(rows for function, rows in calls if function == "mc_sample") == [1, 1, 5, 10, 10]
    whole = model.run("serving_default", {"features": trained.rows})
    np.testing.assert_allclose(predicted["probabilities"], whole["probabilities"], atol=1e-6)
    whole = model.run("mc_sample", {**rows_of(trained, 0, 25), "num_samples": 100, "seed": 0})
    np.testing.assert_allclose(drawn["std"], whole["std"], atol=1e-6)
    assert long_drawn["std"].shape == (2, 2)


def test_a_request_that_fits_into_a_call_is_not_cut_to_fill_one(model, trained):
    async def main():
        batcher = batcher_of(batch_rows=100)
        sizes = [40, 70, 30, 208, 20]
        answers = await asyncio.gather(*[batcher.submit(predict(model), rows_of(trained, 0, size)) for size in sizes])
        batcher.close()
        return answers

    answers = asyncio.run(main())
    # 40; 70 and 30; of 208 twice a hundred, as they need three calls anyway; the last 8 and 20.
    assert [rows for _, rows in model.calls] == [40, 100, 100, 100, 28]
    assert [len(answer["probabilities"]) for answer in answers] == [40, 70, 30, 208, 20]


def test_a_long_mc_call_makes_no_prediction_wait_for_its_end(model, trained):
    async def main():
        batcher = batcher_of(max_row_draws=10**9, max_queue_row_draws=10**9)
        # A minute of work, of which the test waits for one part: the rest is given up.
        long = batcher.submit(draw(model, 10_000), {"features": np.tile(trained.rows, [50, 1])})
        await asyncio.sleep(0)
        for index in range(20):
            await batcher.submit(predict(model), rows_of(trained, index, index + 1))
            assert not long.done()
        if sys.platform == "linux":
            lowest = min(19, os.getpriority(os.PRIO_PROCESS, 0) + DRAWS_NICENESS)
            # On a busy machine the thread may not have begun yet, or one of an earlier test not have ended.
            for _ in range(1_000):
                nice = [os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")]
                if nice.count(lowest) == 1:
                    break
                await asyncio.sleep(0.01)
            assert nice.count(lowest) == 1
        short = batcher.submit(draw(model, 50), rows_of(trained, 0, 1))
        await short
        assert not long.done()
        long.cancel()
        batcher.close()

    asyncio.run(main())


def test_a_full_queue_refuses_and_then_takes_again(model, trained):
    async def main():
        batcher = batcher_of(max_queue=5)
        work = [batcher.submit(predict(model), rows_of(trained, 0, 1)) for _ in range(5)]
        with pytest.raises(QueueFull):
            batcher.submit(predict(model), rows_of(trained, 0, 1))
        # Another lane, another queue.
        work.append(batcher.submit(draw(model, 10), rows_of(trained, 0, 1)))
        await asyncio.gather(*work)
        await batcher.submit(predict(model), rows_of(trained, 0, 1))
        batcher.close()

    asyncio.run(main())


def test_too_many_draws_in_the_queue_are_refused(model, trained):
    async def main():
        batcher = batcher_of(max_queue_row_draws=1000)
        # The first one is taken whatever its size: a limit of its own bounds it.
        first = batcher.submit(draw(model, 2000), rows_of(trained, 0, 1))
        with pytest.raises(QueueFull):
            batcher.submit(draw(model, 10), rows_of(trained, 0, 1))
        await first
        await batcher.submit(draw(model, 10), rows_of(trained, 0, 1))
        batcher.close()

    asyncio.run(main())


def test_a_request_past_its_deadline_is_given_up(model, trained):
    async def main():
        batcher = batcher_of(deadline_ms=1_000, max_queue_row_draws=10**9)
        with pytest.raises(DeadlineExceeded, match="no answer within 1000 ms"):
            # Half a minute of work.
            await batcher.submit(draw(model, 10_000), {"features": np.tile(trained.rows, [50, 1])})
        calls = len(model.calls)
        # The part that is being computed holds its place, and at most that one comes after.
        async with asyncio.timeout(60):
            while batcher.open_requests:
                await asyncio.sleep(0.01)
        assert len(model.calls) <= calls + 1
        await batcher.submit(draw(model, 10), rows_of(trained, 0, 1))
        assert batcher.open_requests == 0
        batcher.close()

    asyncio.run(main())


def test_a_request_that_nobody_waits_for_is_never_run(model, trained):
    async def main():
        batcher = batcher_of()
        given_up = [batcher.submit(predict(model), rows_of(trained, 0, 1)) for _ in range(10)]
        for work in given_up[1:]:
            work.cancel()
        await given_up[0]
        assert batcher.open_requests == 0
        batcher.close()

    asyncio.run(main())
    assert model.calls == [("serving_default", 1)]


def test_after_close_nothing_waits_and_nothing_is_taken(model, trained):
    async def main():
        batcher = batcher_of()
        work = batcher.submit(predict(model), rows_of(trained, 0, 1))
        batcher.close()
        with pytest.raises(Unavailable):
            await work
        with pytest.raises(Unavailable):
            batcher.submit(predict(model), rows_of(trained, 0, 1))

    asyncio.run(main())


def test_a_request_that_the_model_refuses_does_not_fail_its_batch_mates(tmp_path):
    """An embedding refuses an index outside of its table."""
    words = keras.Input((2,), dtype="int32", name="words")
    hidden = keras.layers.Flatten()(keras.layers.Embedding(5, 3)(words))
    hidden = keras.layers.Dropout(0.5)(hidden)
    network = keras.Model(words, keras.layers.Dense(2, activation="softmax", name="kind")(hidden))
    model = Model.load(publish(network, name="words", repository=tmp_path))

    async def main():
        batcher = batcher_of()
        sent = [[0, 1], [4, 5], [2, 3]]
        work = [batcher.submit(predict(model), {"words": np.array([row], np.int32)}) for row in sent]
        answers = await asyncio.gather(*work, return_exceptions=True)
        batcher.close()
        return answers

    good, refused, also_good = asyncio.run(main())
    assert isinstance(refused, InvalidRequest)
    assert "5" in str(refused)
    expected = network.predict(np.array([[0, 1], [2, 3]]), verbose=0)
    np.testing.assert_allclose(good["probabilities"], expected[:1], atol=1e-6)
    np.testing.assert_allclose(also_good["probabilities"], expected[1:], atol=1e-6)


@pytest.mark.parametrize("function", ["serving_default", "mc_sample"])
def test_a_call_of_long_rows_does_not_hold_the_event_loop(signals, function):
    # What the warm-up measured, on a machine that is always the same: a microsecond for a row-draw.
    signals.costs[function] = Cost(variable=1e-6)
    call = predict(signals) if function == "serving_default" else draw(signals, 10)
    rows = 100 // call.draws

    async def main():
        batcher = batcher_of(inline_ms=0.15)
        signals.threads.clear()
        for steps in (3, EXAMPLE_STEPS, 5 * EXAMPLE_STEPS):
            await batcher.submit(call, signals_of(rows, steps))
        batcher.close()

    asyncio.run(main())
    # Shorter than the example, as long, longer.
    assert [thread is threading.main_thread() for thread in signals.threads] == [True, True, False]
