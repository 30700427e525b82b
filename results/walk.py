"""The low level alone on an open floor: how far does it walk where it is told?

python results/walk.py POLICY ...   policies of ants; not of AntFall, whose floor is higher

Every c steps a fresh subgoal in one of eight directions, as far as the high level may ask, then
3 m, nothing asked of the other dimensions, for 200 steps (20 s); printed is the progress in that
direction, in metres, and how many of the eight ants lie on their backs at the end.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from envs import AntMaze
from harness import runs
from harness.options import UserError
from hiro import Policy, goal_transition


class OpenFloor(AntMaze):
    maze = "\nR"


@torch.no_grad()
def walk(policy, reach, steps=200, directions=8, seed=0):
    """Progress [directions] where commanded, m, and which ants [directions] fell over.

    reach  length of each subgoal, m
    """
    progress, fallen = [], []
    for k in range(directions):
        angle = 2 * np.pi * k / directions
        heading = np.array([np.cos(angle), np.sin(angle)])
        command = torch.zeros(len(policy.high.max_action))
        command[:2] = torch.as_tensor(reach * heading)
        env = OpenFloor()
        obs = torch.as_tensor(env.reset(seed=seed + k)[0])
        start = obs[:2]
        for t in range(steps):
            if t % policy.subgoal_steps == 0:
                subgoal = command
            next_obs, *_ = env.step(policy.low_action(obs, subgoal).numpy())
            next_obs = torch.as_tensor(next_obs)
            obs, subgoal = next_obs, goal_transition(obs, subgoal, next_obs)
        progress.append(float((obs[:2] - start).numpy() @ heading))
        fallen.append(bool(obs[4] ** 2 + obs[5] ** 2 > 0.5))  # the torso's axis points downwards
    return np.array(progress), np.array(fallen)


def main(paths):
    torch.set_num_threads(1)
    for path in paths or sys.exit("walk: name one policy.pt or more"):
        try:
            saved = runs.load(path, *runs.POLICY)
        except UserError as error:
            sys.exit(f"walk: {error}")
        if saved["env"] not in ("AntMaze", "AntPush", "AntGather"):
            sys.exit(f"walk: {path} is a policy for {saved['env']}, no ant on a floor at height 0")
        for which in ("latest", "best"):
            policy = Policy.from_state_dict(saved[which]["policy"])
            for reach in (float(policy.high.max_action[0]), 3.0):
                metres, fallen = walk(policy, reach)
                print(
                    f"{path} {which} at {saved[which]['step']:,}: told {reach:.0f} m, "
                    f"mean {metres.mean():.1f} m in 20 s ({' '.join(f'{m:.1f}' for m in metres)}), "
                    f"{fallen.sum()} fell over"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
