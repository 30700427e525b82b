"""Where the time goes: python train.py --env AntMaze --profile [SECONDS] [flags].

Real training, for a minute by default, and each part's milliseconds per environment step. On a GPU
each part waits for the one before.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
import time

import torch

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
    show(run, agent.steps - first, elapsed, watch.seconds)


def show(run, steps, elapsed, spent):
    """Print the table; spent {part: seconds} of the whole profile."""
    print(f"{run.env}, {run.threads} thread(s), {run.num_envs} environment(s), {run.agent.device}")
    print(f"{steps:,} steps in {elapsed:.0f} s: {steps / elapsed:.1f} environment steps/s")
    print(f"\n{'part':<16}{'ms per step':>12}")
    rest = elapsed - sum(spent.values())
    for part, seconds in {**spent, "everything else": rest, "total": elapsed}.items():
        print(f"{part:<16}{1e3 * seconds / steps:>12.3f}")
