"""What a block of samples holds: digests, flags, counts."""

import numpy as np
import pytest

from tsclust_ooc import content


def sample_set(dtype):
    x = np.random.default_rng(0).standard_normal((9, 3, 4)).astype(dtype)
    x[1], x[2], x[3, 1, 2], x[4, 0, :2], x[5] = 0, 2.5, np.nan, [np.inf, -np.inf], np.nan
    x[6, 0, 0], x[6, 0, 1], x[7] = np.nan, np.inf, x[0]
    return x


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_zeros_constants_nan_and_infinities_are_flagged_and_counted(dtype):
    x = sample_set(dtype)
    found = content.look_at(x)
    nan, inf = content.NAN, content.INF
    expected = [0, content.ZERO, content.CONSTANT, nan, inf, nan, nan | inf, 0, 0]
    assert found.flags.tolist() == expected
    assert (found.n_nan, found.n_inf) == (np.isnan(x).sum(), np.isinf(x).sum())


def test_what_is_found_does_not_depend_on_the_block():
    x = sample_set("<f4")
    whole, parts = content.look_at(x), [content.look_at(part) for part in np.split(x, [1, 5])]
    assert np.array_equal(whole.digests, np.concatenate([p.digests for p in parts]))
    assert np.array_equal(whole.flags, np.concatenate([p.flags for p in parts]))


def test_negative_zeros_are_zeros_of_other_bytes():
    found = content.look_at(np.array([[0.0, 0.0], [-0.0, -0.0], [0.0, -0.0]], np.float32))
    assert found.flags.tolist() == [content.ZERO] * 3
    assert len(np.unique(found.digests, axis=0)) == 3


def test_groups_of_equals_are_those_of_numpy():
    rng = np.random.default_rng(1)
    digests = rng.integers(0, 4, (60, 2)).astype(np.uint64)
    known = rng.random(60) < 0.8
    expected = {}
    for i in np.flatnonzero(known):
        expected.setdefault(tuple(digests[i].tolist()), []).append(int(i))
    found = sorted(group.tolist() for group in content.groups_of_equals(digests, known))
    assert found == sorted(group for group in expected.values() if len(group) > 1)


@pytest.mark.parametrize("n", [0, 1])
def test_none_and_one_are_no_group(n):
    assert list(content.groups_of_equals(np.zeros((n, 2), np.uint64), np.ones(n, bool))) == []
