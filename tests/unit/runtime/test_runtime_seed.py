import numpy as np
import pytest

from fieldmark.runtime.seed import derive_seed


def test_a_seed_never_changes_between_versions():
    # Pinned: another value here means that no old run can be repeated or resumed.
    assert derive_seed("order", 0, 0) == 9159349329468658978
    assert derive_seed() == 4090036724241674979


def test_each_part_its_type_and_its_place_count():
    parts = [("a", 1), (1, "a"), ("a", "1"), ("a1",), ("a", 1, 0), ("a", -1), ("", "a", 1)]
    assert len({derive_seed(*each) for each in parts}) == len(parts)
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed('a","b') != derive_seed("a", "b")


def test_numpy_integers_count_as_integers():
    assert derive_seed("x", np.int64(7), np.uint8(3)) == derive_seed("x", 7, 3)
    with pytest.raises(TypeError):
        derive_seed(0.5)


def test_seeds_fill_63_bits():
    seeds = [derive_seed(index) for index in range(2_000)]
    assert len(set(seeds)) == 2_000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.06  # 5 standard deviations
