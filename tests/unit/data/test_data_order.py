from collections import Counter
from itertools import islice

import numpy as np
import pytest

from fieldmark.cookbook import RECIPES, find_recipe
from fieldmark.data.order import Order, Shares, epoch_order
from fieldmark.errors import ConfigError

SIZES = (400, 100, 25, 4)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))


def take(order, count, start=0):
    return list(islice(order.updates(start), count))


def epoch(order, number):
    per_epoch = order.steps_per_epoch
    updates = take(order, per_epoch, number * per_epoch)
    return tuple(
        np.concatenate([getattr(update, name) for update in updates])
        for name in ("indices", "copies")
    )


def same(first, second):
    return all(
        (a.step, a.epoch) == (b.step, b.epoch)
        and np.array_equal(a.indices, b.indices)
        and np.array_equal(a.copies, b.copies)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("sampler", ["shuffle", "balanced", "sqrt"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_late_start_yields_what_an_undisturbed_run_yields(sampler, repeats):
    settings = {"sampler": sampler, "repeats": repeats}
    undisturbed = take(Order(LABELS, 60, 7, **settings), 40)
    for start in (1, 8, 9, 23):
        late = take(Order(LABELS, 60, 7, **settings), 40 - start, start)
        assert same(undisturbed[start:], late)
    other = take(Order(LABELS, 60, 8, **settings), 8)
    assert not same(undisturbed[:8], other)
    assert [update.step for update in undisturbed] == list(range(40))
    assert [update.epoch for update in undisturbed] == [step // 8 for step in range(40)]


def test_a_shuffled_epoch_is_the_permutation():
    order = Order(LABELS, 60, 7)
    indices, copies = epoch(order, 2)
    assert np.array_equal(indices, epoch_order(529, 7, 2)[:480])
    assert not copies.any()


@pytest.mark.parametrize(
    ("sampler", "shares"),
    [("balanced", np.full(4, 0.25)), ("sqrt", np.sqrt(SIZES) / np.sqrt(SIZES).sum())],
)
def test_classes_come_as_often_as_they_should(sampler, shares):
    order = Order(LABELS, 23, 3, sampler=sampler)
    num_draws = order.steps_per_epoch * 23
    total = np.zeros(4)
    for number in range(40):
        indices, _ = epoch(order, number)
        counts = np.bincount(LABELS[indices], minlength=4)
        assert counts.sum() == num_draws
        # In every epoch the exact share, rounded down or up.
        assert (np.abs(counts - shares * num_draws) < 1).all()
        total += counts
    assert np.allclose(total / total.sum(), shares, atol=0.002)
    indices, _ = epoch(order, 0)
    halves = [np.bincount(LABELS[part], minlength=4) for part in np.array_split(indices, 2)]
    assert np.abs(halves[0] - halves[1]).max() < 60  # mixed over the epoch, not one class at a time


@pytest.mark.parametrize("sampler", ["balanced", "sqrt"])
def test_all_of_a_class_come_before_one_comes_again(sampler):
    order = Order(LABELS, 23, 3, sampler=sampler)
    seen = {label: [] for label in range(4)}
    for number in range(5):
        indices, copies = epoch(order, number)
        for label in range(4):
            of_class = LABELS[indices] == label
            # Within an epoch draws are shuffled; the copy number is the pass through the class.
            at = np.argsort(copies[of_class], kind="stable")
            seen[label].append((indices[of_class][at], copies[of_class][at]))
    for label, size in enumerate(SIZES):
        drawn = Counter(np.concatenate([indices for indices, _ in seen[label]]).tolist())
        assert max(drawn.values()) - min(drawn.values()) <= 1 or len(drawn) < size
        assert len(drawn) == min(size, sum(drawn.values()))
        for indices, copies in seen[label]:
            pairs = set(zip(indices.tolist(), copies.tolist(), strict=True))
            assert len(pairs) == len(indices)  # no image twice with the same number


def test_passes_through_a_class_differ():
    order = Order(np.repeat([0, 1], [100, 10]), 100, 0, sampler="balanced")
    indices, copies = epoch(order, 0)
    minority = indices >= 100
    assert sorted(Counter(indices[minority].tolist()).values()) == [5] * 10
    assert sorted(set(copies[minority].tolist())) == [0, 1, 2, 3, 4]
    passes = [tuple(epoch(Order(LABELS, 23, seed, sampler="balanced"), 0)[0]) for seed in (1, 2)]
    assert passes[0] != passes[1]


def test_classes_without_images_are_no_classes():
    labels = np.repeat([2, 5], [30, 10])
    indices, _ = epoch(Order(labels, 20, 0, sampler="balanced"), 0)
    assert np.bincount(labels[indices]).tolist() == [0, 0, 20, 0, 0, 20]


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_each_image_has_its_copies_in_one_update(sampler):
    order = Order(LABELS, 60, 7, sampler=sampler, repeats=3)
    plain = Order(LABELS, 60, 7, sampler=sampler)
    assert order.steps_per_epoch == plain.steps_per_epoch == 529 // 60
    seen = set()
    for update in take(order, order.steps_per_epoch):
        assert len(update.indices) == 60
        parts = update.indices.reshape(3, 20)
        assert (parts == parts[0]).all()  # first copies, then second ones, then third ones
        pairs = list(zip(update.indices.tolist(), update.copies.tolist(), strict=True))
        assert len(set(pairs)) == 60
        assert not seen & set(pairs)
        seen |= set(pairs)
    assert len(seen) == 8 * 60
    if sampler == "shuffle":
        assert len({index for index, _ in seen}) == 8 * 20


@pytest.mark.parametrize("sampler", ["shuffle", "balanced", "sqrt"])
def test_an_update_that_is_no_multiple_of_the_copies_lacks_some_last_ones(sampler):
    order = Order(LABELS, 64, 7, sampler=sampler, repeats=3)
    num_different, seen = 22, set()
    for update in take(order, order.steps_per_epoch):
        assert len(update.indices) == len(update.copies) == 64
        first, second, third = np.split(update.indices, [num_different, 2 * num_different])
        assert (first == second).all()
        assert (third == first[:20]).all()
        pairs = set(zip(update.indices.tolist(), update.copies.tolist(), strict=True))
        assert len(pairs) == 64
        assert not seen & pairs
        seen |= pairs
    late = take(order, 6, 10)
    assert same(late, take(Order(LABELS, 64, 7, sampler=sampler, repeats=3), 16)[10:])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_s_own_numbers_make_an_order(name):
    config = find_recipe(name)
    if config.train.batch_size == "auto" or config.train.method == "linear-probe":
        pytest.skip("it has no batch size of its own")
    labels = np.zeros(5_000, dtype=np.int64)
    data, batch_size = config.data, config.train.examples_per_update
    order = Order(labels, batch_size, 0, sampler=data.sampler, repeats=data.repeats)
    [update] = take(order, 1)
    assert len(update.indices) == batch_size
    assert len(set(update.indices.tolist())) == -(-batch_size // data.repeats)
    Shares(batch_size, config.train.accumulation_steps)


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 1), (2, 3), (4, 1), (1, 6)])
def test_ranks_divide_an_update_in_order(num_ranks, accumulation):
    covered = []
    for rank in range(num_ranks):
        shares = Shares(12, accumulation, rank, num_ranks)
        assert len(shares.parts) == accumulation
        for part in shares.parts:
            covered += range(*shares.positions(part).indices(12))
    assert covered == list(range(12))


def test_what_cannot_be_is_an_error():
    with pytest.raises(ConfigError, match="processes times train.accumulation_steps. Got 12 for 5"):
        Shares(12, 1, 0, 5)
    with pytest.raises(ConfigError, match="Got 530 for 529 images"):
        Order(LABELS, 530, 0)
