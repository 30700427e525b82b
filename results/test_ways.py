"""Tests of ways.py, on tracks made by hand."""

import numpy as np

from results import ways


def track(*places):
    """x, y, z, block [T, 2] of a robot whose block does not move."""
    return *np.array(places, float).T, np.zeros((len(places), 2))


def passed(way):
    return [name for name, reached in way.items() if reached]


def test_the_places_of_push():
    x, y, z, block = track((0, 0, 0.7), (-4, 0, 0.7), (-4, 8, 0.7), (0, 8, 0.7), (0, 14, 0.7))
    assert passed(ways.push(x, y, z, block)) == ["turns left", "passes its corner", "in the gap"]
    block[3:] = [2.0, 0.5]  # to the right first: what it rises by later is no matter
    assert "lifts block early" not in passed(ways.push(x, y, z, block))
    assert "block aside" in passed(ways.push(x, y, z, block))
    block[1] = [1.0, 0.5]
    assert "lifts block early" in passed(ways.push(x, y, z, block))


def test_the_places_of_fall():
    x, y, z, block = track((0, 0, 4.7), (8, 0, 4.7), (8, 22, 4.7), (0, 24, 4.7))
    assert passed(ways.fall(x, y, z, block)) == ["turns right", "across", "turns back"]
    block[2:] = [2.0, -4.0]
    assert passed(ways.fall(x, y, z, block))[1:3] == ["pushes", "block dropped"]
    x, y, z, block = track((0, 0, 4.7), (0, 13, 0.7), (0, 22, 0.7))
    assert passed(ways.fall(x, y, z, block)) == ["falls"]


def test_what_gather_counts():
    x, y, z, left = track((0, 0, 0.6), (1, 0, 0.6), (2, 0, 0.2))
    left += [[8, 8], [8, 7], [6, 7]]
    assert ways.gather(x, y, z, left) == {"apples": 2, "bombs": 1, "falls": True}
    assert not ways.gather(*(np.zeros((500, n)) for n in (1, 1, 1, 2)))["falls"]
