"""Tests of walk.py, on ants that slide or stand."""

import numpy as np

from envs import AntFall, AntMaze, AntPush
from results import walk


def test_speed_and_falls_are_counted_until_an_ant_turns_over():
    states = np.zeros((11, 2, 30))
    states[:, :, 3] = 1.0  # upright
    states[:, 0, 1] = 0.05 * np.arange(11)  # .5 m/s along y, all the time
    states[:, 1, 0] = -0.2 * np.arange(11)  # 2 m/s along -x, but on its back from 0.5 s on
    states[5:, 1, 3:7] = 0, 1, 0, 0
    states[8:, 1, 3:7] = 1, 0, 0, 0  # rolled on: it has fallen nevertheless
    speed, falls, seconds = walk.gait(states, np.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert falls == 1 and np.isclose(seconds, 1.0 + 0.4)
    assert np.isclose(speed, (0.5 * 1.0 + 2.0 * 0.4) / 1.4)


def test_an_ant_of_fall_sees_the_ground_where_its_platform_is():
    (plain, _), (raised, _) = (task().reset(seed=3) for task in (walk.Plain, walk.Raised))
    on_platform, _ = AntFall().reset(seed=3)
    z = np.arange(len(plain)) == 2
    assert np.array_equal(plain[~z], raised[~z])
    assert np.isclose(raised[2], plain[2] + 4) and np.isclose(raised[2], on_platform[2])


def test_push_s_and_fall_s_ants_walk_on_ground_as_hard_as_theirs():
    for task, ground in ((AntPush, walk.Hard), (AntFall, walk.Raised), (AntMaze, walk.Plain)):
        there, here = (kind().model.geom_solimp[:, :3] for kind in (task, ground))
        assert np.array_equal(here, np.broadcast_to(there[0], here.shape))
