"""How fast does an ant walk where it is told, and how often does it turn over? On open ground.

python results/walk.py POLICY ...   policies of ants; 96 of each, 20 s, one direction each
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from envs import WALL, AntMaze
from harness.options import UserError, one_line_errors, paths
from harness.runs import load_policy, make_envs
from hiro import Policy
from train import evaluate

ANTS, DISTANCES = 96, (5.0, 10.0)  # m, how far ahead the subgoals lie


class Plain(AntMaze):
    maze, max_steps = "\nR", 200


class Hard(Plain):
    """Ground as hard as in AntPush and AntFall, where ants turn over more often."""

    def _build(self):
        spec = super()._build()
        for geom in spec.geoms:
            geom.solimp[:3] = (0.995, 0.995, 0.01)
        return spec


class Raised(Hard):
    """The same, seen as high up as the platform on which AntFall's ants learn to walk."""

    def _observation(self):
        obs = super()._observation()
        obs[2] += WALL
        return obs


class Compass:
    """A high level that asks each ant for a step in its direction [N, 2] (m), and nothing else."""

    def __init__(self, max_action, step):
        self.max_action, self.subgoal = max_action, torch.zeros(len(step), len(max_action))
        self.subgoal[:, :2] = torch.as_tensor(step)

    def __call__(self, obs):
        return self.subgoal


def gait(states, direction):
    """Speed (m/s) and falls of ants until each turns over.

    states [T, N, S] at 10 a second, direction [N, 2] of length 1
    returns  mean speed in the direction, number that turned over, seconds on their feet together
    """
    x, y = states[..., 4], states[..., 5]  # of the quaternion w, x, y, z
    upright = np.logical_and.accumulate(1 - 2 * (x**2 + y**2) > 0)
    way = ((states[1:, :, :2] - states[:-1, :, :2]) * direction).sum(-1)
    seconds = 0.1 * upright[1:].sum()
    return way[upright[1:]].sum() / seconds, int((~upright[-1]).sum()), seconds


def walk(policy, envs, distance):
    """gait() of a policy's low level in N environments, with subgoals so far ahead (m)."""
    n, states = envs.num_envs, []
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, n)
    direction = np.stack([np.cos(angle), np.sin(angle)], 1)
    policy.high = Compass(policy.high.max_action, distance * direction)
    evaluate(policy, envs, n, seed=0, watch=lambda t, obs, subgoal: states.append(obs.copy()))
    return gait(np.array(states), direction)


def main(argv):
    torch.set_num_threads(1)
    for path in paths(argv, __doc__, "POLICY"):
        saved = load_policy(path)
        policy, step = Policy.from_state_dict(saved["latest"]["policy"]), saved["latest"]["step"]
        if policy.state_dim != AntMaze.state_dim:
            raise UserError(f"{path} is a policy for {saved['env']}, which has no ant")
        ground = {"AntPush": Hard, "AntFall": Raised}.get(saved["env"], Plain)
        envs = make_envs(ground, ANTS, evaluate=True)
        for distance in DISTANCES:
            speed, falls, seconds = walk(policy, envs, distance)
            often = f"one in {seconds / falls:.0f} s" if falls else f"none in {seconds:.0f} s"
            print(f"{path}, {step:,} steps, {distance:.0f} m: {speed:.2f} m/s, {often} turns over")
        envs.close()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
