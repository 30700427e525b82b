"""Where the time goes: python train.py --env AntMaze --profile [SECONDS] [flags].

Real training, for a minute by default. Beside each part's milliseconds per environment step stands
the least that they could be: its matrix products at the speed this machine reaches on one product
of batch_size rows (relabelling: of all candidates and steps, in the precision that is used), and
the simulator's bare mj_step, one copy after the other. On a GPU each part waits for the one before.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
import time

import mujoco
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.options import UserError, configs, flag
from harness.runs import Run
from hiro import HIRO

SHORT_START = dict(start_steps=1_000, low_uniform_steps=0, high_uniform_steps=0)
PARTS = ("acting", "simulator", "storing", "low update", "relabelling", "high update")


class ShortRun(Run):
    """A run that neither evaluates nor saves, and says nothing."""

    def due(self, every):
        return False

    def save(self, *live):
        pass

    def train(self, train, agent, goes_on):
        """train.train(agent, self) while goes_on() is true."""
        self.goes_on = lambda: goes_on() and not self.stop
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            with contextlib.closing(self):
                train(agent, self)
        if self.stop:
            raise KeyboardInterrupt


class Stopwatch:
    """Adds up the seconds spent in wrapped methods; a nested one counts for itself alone."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.nested = 0.0

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner, method, part):
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            outside, self.nested = self.nested, 0.0
            start = self.now()
            result = inner(*args, **kwargs)
            elapsed = self.now() - start
            self.seconds[part] += elapsed - self.nested
            self.nested = outside + elapsed
            return result

        setattr(owner, method, timed)


def flops_per_second(rows, hidden, device, dtype=torch.float32):
    """Of a product [rows, hidden] x [hidden, hidden]: the best of ten tries."""
    a, b = (torch.randn(n, hidden, device=device).to(dtype) for n in (rows, hidden))
    watch, tries = Stopwatch(device), []
    repeats = 1 + 20_000 // rows
    for _ in range(10):
        start = watch.now()
        for _ in range(repeats):
            a @ b
        tries.append((watch.now() - start) / repeats)
    return 2 * rows * hidden**2 / min(tries)


def flops(call, repeats=1):
    """Of the matrix products in one call, the mean of several."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(repeats):
            call()
    return counter.get_total_flops() / repeats


def bare_simulator(env):
    """Seconds of mj_step alone in one environment step; 0 for a task that is not of MuJoCo."""
    model, frame_skip = getattr(env, "model", None), getattr(env, "frame_skip", 1)
    if not isinstance(model, mujoco.MjModel):
        return 0.0
    data = mujoco.MjData(model)
    repeats, tries = 50, []
    for _ in range(10):
        mujoco.mj_resetData(model, data)
        start = time.perf_counter()
        for _ in range(repeats):
            mujoco.mj_step(model, data, nstep=frame_skip)
        tries.append((time.perf_counter() - start) / repeats)
    return min(tries)


def profile(given, train):
    """Train for given["profile"] seconds and print the table; leaves nothing behind.

    given  the flags as typed
    train  train.train
    """
    seconds = given["profile"]
    if not 0 < seconds < math.inf:
        raise UserError(f"--profile {seconds}: must be positive")
    for name in {"resume", "run_dir"} & given.keys():
        raise UserError(f"{flag(name)} does not go with --profile")
    settings, config = configs(given)
    settings = dataclasses.replace(settings, eval_episodes=1)  # there will be none
    short = {name: steps for name, steps in SHORT_START.items() if name not in given}
    short["start_steps"] = max(
        short.get("start_steps", 0), config.subgoal_steps * settings.num_envs
    )
    config = dataclasses.replace(config, **short)
    with tempfile.TemporaryDirectory() as folder:
        run = ShortRun(settings, config, pathlib.Path(folder))
        agent = HIRO(run.task, config, run.num_envs, run.seed, run.device)
        watch = Stopwatch(agent.device)
        turns = 2 * config.policy_delay * config.subgoal_steps  # until all parts are at work
        run.train(train, agent, lambda: len(agent.turns(agent.steps)) < turns)
        speeds, floors = measure_floors(agent, run)
        for owner, method, part in (
            (agent, "low_action", "acting"),
            (agent, "high_action", "acting"),
            (run, "env_step", "simulator"),
            (agent, "remember_step", "storing"),
            (agent, "remember_segment", "storing"),
            (agent, "update_low", "low update"),
            (agent, "update_high", "high update"),
            (agent, "correct", "relabelling"),
        ):
            watch.wrap(owner, method, part)
        first = agent.steps
        run.train(train, agent, lambda: watch.now() - run.clock < seconds)
        elapsed = watch.now() - run.clock
    show(run, agent.steps - first, elapsed, watch.seconds, speeds, floors)


def measure_floors(agent, run):
    """The speeds of two products, {(rows, dtype): FLOP/s}, and {part: seconds per step}."""
    config = agent.config
    few = config.batch_size, torch.float32
    many = config.num_corrected * config.num_candidates * config.subgoal_steps
    many = many, torch.bfloat16 if agent.bfloat16 else torch.float32
    speeds = {
        (rows, dtype): flops_per_second(rows, config.hidden, agent.device, dtype)
        for rows, dtype in (few, many)
    }
    batch = agent.high_buffer.sample(config.batch_size)
    batch["action"] = batch["subgoal"]
    obs = torch.zeros(run.num_envs, len(run.task.observation_scale), device=agent.device)
    subgoal = agent.high_action(obs)
    updating = flops(lambda: agent.high.update(batch), config.policy_delay)
    relabelling = flops(agent.update_high, config.policy_delay) - updating
    acting = flops(lambda: agent.low_action(obs, subgoal))
    acting += flops(lambda: agent.high_action(obs)) / config.subgoal_steps
    low = flops(agent.update_low, config.policy_delay)
    segment = config.update_every * config.subgoal_steps
    env = run.task(evaluate=False, render_mode=None)
    floors = {
        "acting": acting / run.num_envs / speeds[few],
        "simulator": bare_simulator(env),
        "storing": 0.0,
        "low update": 0.0 if agent.low_rests else low / config.update_every / speeds[few],
        "relabelling": relabelling / segment / speeds[many],
        "high update": updating / segment / speeds[few],
    }
    env.close()
    return speeds, floors


def show(run, steps, elapsed, spent, speeds, floors):
    """Print the table.

    spent, floors  {part: seconds}, of the whole profile and of one environment step
    """
    agent = run.agent
    print(f"{run.env}, {run.threads} thread(s), {run.num_envs} environment(s), {agent.device}")
    print(f"{steps:,} steps in {elapsed:.0f} s: {steps / elapsed:.1f} environment steps/s")
    products = (
        f"{speed / 1e9:.0f} GFLOP/s at {rows:,} rows ({str(dtype)[6:]})"
        for (rows, dtype), speed in speeds.items()
    )
    print(f"products: {', '.join(products)}")
    print(f"\n{'part':<16}{'ms per step':>12}{'floor':>10}")
    rest, floor = elapsed - sum(spent.values()), sum(floors.values())
    rows = {part: (spent[part], floors[part]) for part in PARTS}
    rows |= {"everything else": (rest, 0.0), "total": (elapsed, floor)}
    for part, (seconds, least) in rows.items():
        print(f"{part:<16}{1e3 * seconds / steps:>12.3f}{1e3 * least:>10.3f}")
    print(f"total / floor {elapsed / steps / floor:.2f}")
