"""Where along the way do episodes end? Shares of them that pass each place, as a table.

Gather has no places: there it is what an episode collects on average, and the share that falls.

python results/ways.py POLICY ...   policies of AntPush, PointPush, AntFall or AntGather
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from envs import AntGather
from harness.options import UserError, find_task, one_line_errors, paths
from harness.runs import load_policy, make_envs
from hiro import Policy
from train import evaluate

EPISODES = 50


def push(x, y, z, block):
    """Push's way: left, up beside the block, right, up through the gap. Arrays over time."""
    aside = block[:, 0] > 1.5  # m: room for the ant
    first = aside.argmax() if aside.any() else len(x)
    return {
        "turns left": (x < -3).any(),
        "lifts block early": (block[:first, 1] > 0.1).any(),
        "passes its corner": ((x < -3) & (y > 4)).any(),
        "block aside": aside.any(),
        "in the gap": ((np.abs(x) < 4) & (y > 12)).any(),
    }


def fall(x, y, z, block):
    """Fall's way: right, push the block into the chasm, over it, left. Arrays over time."""
    return {
        "turns right": (x > 4).any(),
        "falls": (z < 3).any(),
        "pushes": (block[:, 0] > 1).any(),
        "block dropped": (block[:, 1] < -3.9).any(),
        "across": ((y > 20) & (z > 3)).any(),
        "turns back": ((y > 20) & (x < 4) & (z > 3)).any(),
    }


def gather(x, y, z, left):
    """Gather: what is collected before the last step, and whether a fall ends it. left [T, 2]."""
    apples, bombs = left[0] - left[-1]
    return {"apples": apples, "bombs": bombs, "falls": len(x) < AntGather.max_steps}


WAYS = {"AntPush": push, "PointPush": push, "AntFall": fall, "AntGather": gather}
END = {"success_rate": "arrives", "return": "return"}  # by the task's score


def things(robot):
    """Where Push's and Fall's block has moved to (m), or how many apples and bombs are left."""
    if isinstance(robot, AntGather):
        return (robot.values > 0).sum(), (robot.values < 0).sum()
    return robot.data.qpos[robot.num_qpos :]


def ways(path):
    """{column: mean over 50 episodes} of a saved policy, and its step."""
    saved = load_policy(path)
    if saved["env"] not in WAYS:
        known = ", ".join(WAYS)
        raise UserError(f"{path} is a policy for {saved['env']}; known are {known}")
    latest = saved["latest"]
    policy = Policy.from_state_dict(latest["policy"])
    task = find_task(saved["env"])
    envs = make_envs(task, EPISODES, evaluate=True)
    robots = [env.unwrapped for env in envs.envs]
    trace = []

    def watch(t, obs, subgoal):
        places = [(robot.data.body("torso").xpos, things(robot)) for robot in robots]
        trace.append([np.concatenate(place) for place in places])

    results = evaluate(policy, envs, EPISODES, seed=0, watch=watch)
    rows = []
    for places, result in zip(np.array(trace).transpose(1, 0, 2), results, strict=True):
        places = places[: result["steps"]]  # what follows is another episode
        x, y, z, *_ = places.T
        row = WAYS[saved["env"]](x, y, z, places[:, 3:])
        rows.append({**row, END[task.score]: result[task.score]})
    envs.close()
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}, latest["step"]


def main(argv):
    torch.set_num_threads(1)
    for k, path in enumerate(paths(argv, __doc__, "POLICY")):
        shares, step = ways(path)
        if k == 0:
            print("| step | " + " | ".join(shares) + " |\n" + "|---" * (1 + len(shares)) + "|")
        print(f"| {step:,} | " + " | ".join(f"{share:.2f}" for share in shares.values()) + " |")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
