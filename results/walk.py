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

from envs import TASKS, AntMaze
from hiro import HIRO, goal_transition
from train import UserError, configs, load_policy


class OpenFloor(AntMaze):
    maze = "\nR"


def walk(agent, reach, steps=200, directions=8, seed=0):
    """Progress [directions] where commanded, m, and which ants [directions] fell over.

    reach  length of each subgoal, m
    """
    progress, fallen = [], []
    for k in range(directions):
        angle = 2 * np.pi * k / directions
        heading = np.array([np.cos(angle), np.sin(angle)])
        command = np.zeros((1, len(agent.subgoal_scale)), np.float32)
        command[0, :2] = reach * heading
        env = OpenFloor()
        obs, _ = env.reset(seed=seed + k)
        start = obs[:2].copy()
        for t in range(steps):
            if t % agent.config.subgoal_steps == 0:
                subgoal = command
            low_obs, low_subgoal = agent.tensor(obs[None]), agent.tensor(subgoal)
            action = agent.low_action(low_obs, low_subgoal, explore=False)
            next_obs, *_ = env.step(action[0].numpy())
            subgoal = goal_transition(obs[None], subgoal, next_obs[None])
            obs = next_obs
        progress.append(float((obs[:2] - start) @ heading))
        fallen.append(obs[4] ** 2 + obs[5] ** 2 > 0.5)  # the torso's axis points downwards
    return np.array(progress), np.array(fallen)


def main(paths):
    torch.set_num_threads(1)
    for path in paths or sys.exit("walk: name one policy.pt or more"):
        try:
            policy = load_policy(path)
            _, config = configs({"env": policy["env"], **policy["config"]})
        except UserError as error:
            sys.exit(f"walk: {error}")
        if policy["env"] not in ("AntMaze", "AntPush", "AntGather"):
            sys.exit(f"walk: {path} is a policy for {policy['env']}, no ant on a floor at height 0")
        agent = HIRO(TASKS[policy["env"]], config)
        for which in ("latest", "best"):
            agent.load_policy_dict(policy[which])
            for reach in (float(agent.high.max_action[0]), 3.0):
                metres, fallen = walk(agent, reach)
                print(
                    f"{path} {which} at {policy[which]['step']:,}: told {reach:.0f} m, "
                    f"mean {metres.mean():.1f} m in 20 s ({' '.join(f'{m:.1f}' for m in metres)}), "
                    f"{fallen.sum()} fell over"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
