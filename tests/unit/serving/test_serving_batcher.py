"""batcher.py and cost.py: what goes into a batch, whose failure it is, what waiting costs."""

import asyncio
import dataclasses
import math
import threading
import time

import numpy as np
import pytest

from fieldmark.errors import ModelError
from fieldmark.serving.batcher import Batcher
from fieldmark.serving.cost import BatchCost
from fieldmark.serving.limits import Limits
from fieldmark.serving.replies import Busy, Late
from fieldmark.serving.service import Service

POISON = 255


def image(value):
    return np.full((2, 2, 3), value, np.uint8)


class Model:
    """Logits are an image's first byte; it counts its batches and waits for `release`."""

    def __init__(self):
        self.sizes = []
        self.release = threading.Event()
        self.release.set()

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        assert self.release.wait(10)
        if (pixels == POISON).any():
            raise RuntimeError("poison")
        return pixels[:, 0, 0, :1].astype(np.float32)


def send(batcher, values, deadline=math.inf):
    return [asyncio.create_task(batcher.logits(image(value), deadline)) for value in values]


def test_what_waits_goes_together_and_each_gets_its_own():
    model, reports = Model(), []

    async def go():
        batcher = Batcher(model, max_batch_size=4, report=reports.append)
        return await asyncio.gather(*send(batcher, range(10))), batcher.num_inside

    found, inside = asyncio.run(go())
    assert [float(logits[0]) for logits in found] == list(range(10))
    assert model.sizes == [4, 4, 2]
    assert [report.num_images for report in reports] == [4, 4, 2]
    assert inside == 0


def test_an_image_that_comes_as_the_last_one_leaves_is_not_forgotten():
    model = Model()

    async def go():
        batcher = Batcher(model, max_batch_size=4)
        async with asyncio.timeout(5):
            for value in range(20):
                logits = await batcher.logits(image(value), math.inf)
                assert float(logits[0]) == value

    asyncio.run(go())
    assert model.sizes == [1] * 20


@pytest.mark.parametrize(("max_wait_s", "sizes"), [(600, [2]), (0.0, [1, 1])])
def test_a_batch_waits_to_fill_from_its_first_image_on(max_wait_s, sizes):
    model = Model()

    async def go():
        batcher = Batcher(model, max_batch_size=2, max_wait_s=max_wait_s)
        first = send(batcher, [1])
        await asyncio.sleep(0.05)
        async with asyncio.timeout(60):  # a full batch does not wait any longer
            await asyncio.gather(*first, *send(batcher, [2]))

    asyncio.run(go())
    assert model.sizes == sizes


@pytest.mark.parametrize("at_once", [True, False])
def test_a_lone_image_begins_before_the_event_loop_gets_to_anything_else(at_once):
    begun = threading.Event()

    def model(pixels):
        begun.set()
        return pixels[:, 0, 0, :1].astype(np.float32)

    async def go():
        batcher = Batcher(model, max_batch_size=4)
        asyncio.get_running_loop().call_soon(lambda: seen.append(begun.wait(5 if at_once else 0.2)))
        await batcher.logits(image(1), math.inf, at_once)

    seen = []
    asyncio.run(go())
    assert seen == [at_once]


def test_a_batch_that_does_not_fill_goes_after_the_wait():
    model = Model()

    async def go():
        batcher = Batcher(model, max_batch_size=8, max_wait_s=0.05)
        await asyncio.wait_for(asyncio.gather(*send(batcher, [1, 2])), 5)

    asyncio.run(go())
    assert model.sizes == [2]


def test_one_that_fails_is_no_other_s_failure():
    model = Model()

    async def go():
        batcher = Batcher(model, max_batch_size=4)
        return await asyncio.gather(*send(batcher, [1, POISON, 3, 4]), return_exceptions=True)

    found = asyncio.run(go())
    assert isinstance(found[1], ModelError)
    assert "poison" not in str(found[1])
    assert [float(found[k][0]) for k in (0, 2, 3)] == [1, 3, 4]
    assert model.sizes == [4, 1, 1, 1, 1]


def test_what_is_late_or_gone_is_not_computed():
    model = Model()
    model.release.clear()

    async def go():
        batcher = Batcher(model, max_batch_size=1)
        [first] = send(batcher, [1])
        await asyncio.sleep(0.02)
        [late] = send(batcher, [2], time.monotonic() + 0.01)
        gone, last = send(batcher, [3, 4])
        await asyncio.sleep(0.05)
        gone.cancel()
        assert batcher.num_waiting == 3
        assert batcher.oldest_s() > 0.03
        model.release.set()
        assert float((await last)[0]) == 4
        await first
        with pytest.raises(Late):
            await late

    asyncio.run(go())
    assert model.sizes == [1, 1]


def test_what_was_given_up_is_not_kept_until_its_turn():
    model = Model()
    model.release.clear()

    async def go():
        batcher = Batcher(model, decode=lambda data, _: image(data[0]), max_batch_size=1)
        [first] = send(batcher, [1])
        await asyncio.sleep(0.02)
        asked = asyncio.create_task(batcher.logits(b"2" * 1000, math.inf))
        await asyncio.sleep(0.02)
        [waits] = batcher._queue
        assert len(waits.image) == 1000
        asked.cancel()
        await asyncio.sleep(0.02)
        assert waits.image == b""
        model.release.set()
        await first
        assert float((await batcher.logits(b"3", math.inf))[0]) == ord("3")
        assert batcher.problem(60) is None

    asyncio.run(go())
    assert model.sizes == [1, 1]


def test_a_crash_of_the_batcher_is_told():
    def report(_):
        raise RuntimeError("broken")

    async def go():
        batcher = Batcher(Model(), max_batch_size=1, report=report)
        await asyncio.gather(*send(batcher, [1]))
        await asyncio.sleep(0)
        return batcher.problem(60)

    assert "crashed" in asyncio.run(go())


def test_the_cost_of_a_batch_is_learnt_as_a_line():
    cost = BatchCost()
    assert (cost.line(), cost.seconds(100, 8)) == ((0.0, 0.0), 0.0)
    cost.add(4, 0.04)
    assert cost.line() == pytest.approx((0.01, 0.0))  # one size alone says nothing of the rest
    for num_images in (1, 2, 4, 8) * 20:
        cost.add(num_images, 0.010 * num_images + 0.004)
    assert cost.line() == pytest.approx((0.010, 0.004), rel=1e-2)
    assert cost.seconds(20, 8) == pytest.approx(0.2 + 3 * 0.004, rel=1e-3)
    for num_images in (1, 2, 4, 8) * 100:  # a machine that became twice as slow
        cost.add(num_images, 0.020 * num_images + 0.008)
    assert cost.line() == pytest.approx((0.020, 0.008), rel=1e-2)


@pytest.mark.parametrize("batches", [[(1, 0.1), (8, 0.05)], [(1, 0.001), (8, 0.4)]])
def test_a_cost_is_never_negative(batches):
    cost = BatchCost()
    for num_images, seconds in batches:
        cost.add(num_images, seconds)
    assert min(cost.line()) >= 0
    assert cost.seconds(3, 8) > 0


def test_what_would_be_late_is_refused_with_the_time_to_wait(make_predictor, encode):
    model = Model()

    def slow(pixels):
        assert model.release.wait(10)
        return np.zeros((len(pixels), 3), np.float32)

    async def go():
        service = Service(make_predictor(slow), Limits(max_batch_size=1))
        red = encode("red")
        await service.logits([red], math.inf)
        for _ in range(60):
            service.batcher.cost.add(1, 1.0)  # so it is known to take a second
        model.release.clear()
        inside = asyncio.create_task(service.logits([red] * 4, math.inf))
        await asyncio.sleep(0.05)
        assert service.predicted_s(1) == pytest.approx(5, rel=0.1)
        with pytest.raises(Busy, match="It would take about") as refused:
            await service.logits([red], time.monotonic() + 2.5)
        assert (
            'fieldmark_refused_total{reason="deadline"} 1.0' in service.metrics.page("")[0].decode()
        )
        assert refused.value.retry_after_s == 3
        waits = asyncio.create_task(service.logits([red], time.monotonic() + 60))
        await asyncio.sleep(0.05)
        model.release.set()
        assert len(await inside) == 4
        assert len(await waits) == 1

    asyncio.run(go())


def test_what_is_late_once_its_neighbours_are_decoded_is_not_computed():
    model, begun = Model(), threading.Event()

    def slow(encoded, deadline):
        begun.set()
        time.sleep(0.15)
        return image(len(encoded))

    async def go():
        batcher = Batcher(model, decode=slow, max_batch_size=4)
        first = asyncio.create_task(batcher.logits(b"x", math.inf))
        while not begun.is_set():  # it is being decoded; the others will go together
            await asyncio.sleep(0.001)
        soon = time.monotonic() + 0.2
        rest = [asyncio.create_task(batcher.logits(b"xx", end)) for end in (soon, math.inf)]
        return await asyncio.gather(first, *rest, return_exceptions=True)

    first, late, last = asyncio.run(go())
    assert (float(first[0]), float(last[0])) == (1, 2)
    assert isinstance(late, Late)
    assert model.sizes == [1, 1]


def test_each_of_a_batch_that_fails_is_looked_at_before_it_runs_alone():
    """The first alone takes so long that the second is late by then."""
    sizes = []

    def predict(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise RuntimeError("poison")
        time.sleep(1.2)
        return pixels[:, 0, 0, :1].astype(np.float32)

    async def go():
        batcher = Batcher(predict, max_batch_size=4, max_wait_s=0.05)
        ends = math.inf, time.monotonic() + 1
        tasks = [asyncio.create_task(batcher.logits(image(1), end)) for end in ends]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, late = asyncio.run(go())
    assert float(first[0]) == 1
    assert isinstance(late, Late)
    assert sizes == [2, 1]


def test_an_image_alone_takes_the_quicker_way_which_teaches_what_the_usual_one_costs():
    usual, alone, cost = Model(), Model(), BatchCost()

    async def go():
        batcher = Batcher(
            usual, alone=alone, alone_gain=1e6, workers=2, max_batch_size=4, cost=cost
        )
        await asyncio.gather(*send(batcher, [1]))
        assert (usual.sizes, alone.sizes) == ([], [1])
        assert cost.seconds(1, 4) > 1  # microseconds, times what was gained
        alone.release.clear()
        first = send(batcher, [3])
        while len(alone.sizes) < 2:
            await asyncio.sleep(0.001)
        await asyncio.gather(*send(batcher, [4]))  # while another runs: the usual way
        assert (usual.sizes, alone.sizes) == ([1], [1, 1])
        alone.release.set()
        assert float((await asyncio.gather(*first))[0][0]) == 3
        with pytest.raises(ModelError):
            await asyncio.gather(*send(batcher, [POISON]))

    asyncio.run(go())
    assert (usual.sizes, alone.sizes) == ([1], [1, 1, 1])


def test_a_service_that_was_slow_once_learns_from_lone_images_that_it_no_longer_is(make_predictor):
    """What is refused teaches nothing, and beside a slow model nothing else is admitted."""
    slow_s = [1.0]

    def predict(pixels):
        time.sleep((0.01 + slow_s[0]) * len(pixels))
        return np.zeros((len(pixels), 3), np.float32)

    one = dataclasses.replace(make_predictor(predict), workers=2, alone=predict, alone_gain=1.5)

    async def go():
        cost = BatchCost()
        for size in (1, 2, 4):
            cost.add(size, 0.01 * size)
        service = Service(one, Limits(), cost)
        pixels = np.zeros((16, 16, 3), np.uint8)

        async def ask(seconds):
            try:
                return await service.answers([pixels], time.monotonic() + seconds)
            except Busy as refusal:
                return refusal

        await asyncio.gather(*(ask(30) for _ in range(4)))
        slow_s[0] = 0.0
        refused = []
        while len(refused) < 300 and refused[-3:] != [0, 0, 0]:
            found = await asyncio.gather(*(ask(1.0) for _ in range(3)))
            refused.append(sum(isinstance(one, Busy) for one in found))
        service.close()
        return refused

    refused = asyncio.run(go())
    assert refused[0] > 0
    assert refused[-1] == 0


def test_lone_images_take_back_what_slow_ones_taught_and_no_more(make_predictor):
    """Alone an image may be sooner than others will be, so that it says nothing beyond that."""

    class Known(BatchCost):
        def seconds(self, num_images, most):
            return 0.2 * num_images

    one = make_predictor(lambda pixels: np.zeros((len(pixels), 3), np.float32))

    async def go():
        service = Service(one, Limits(), Known())
        service._slowness = 1.05
        pixels, found = np.zeros((16, 16, 3), np.uint8), []
        for _ in range(60):
            await service.answers([pixels], math.inf)
            found.append(service._slowness)
        service.close()
        return found

    found = asyncio.run(go())
    assert found[0] < 1.05
    assert 0.99 < found[-1] <= 1
