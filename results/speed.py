"""Where the time goes: python train.py --env AntMaze --profile [SECONDS] [flags].

Real training, for a minute by default. Beside each part's milliseconds per environment step stands
the least that they could be: its matrix products at the speed this machine reaches on one product
of that many rows, and the simulator's bare mj_step.
"""

import time

import mujoco
import torch
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 1_000  # environment steps
PARTS = ("acting", "simulator", "storing", "low update", "relabelling", "high update")


class Stopwatch:
    """Adds up the seconds spent in wrapped methods; a nested one counts for itself alone."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.seconds, self.calls = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
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
            self.calls[part] += 1
            self.nested = outside + elapsed
            return result

        setattr(owner, method, timed)


def flops_per_second(rows, hidden, device):
    """Of a float32 product [rows, hidden] x [hidden, hidden]: the best of ten tries."""
    a, b = torch.randn(rows, hidden, device=device), torch.randn(hidden, hidden, device=device)
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
    """Seconds of mj_step alone in one environment step."""
    env = env.unwrapped
    data = mujoco.MjData(env.model)
    repeats, tries = 50, []
    for _ in range(10):
        mujoco.mj_resetData(env.model, data)
        start = time.perf_counter()
        for _ in range(repeats):
            mujoco.mj_step(env.model, data, nstep=env.frame_skip)
        tries.append((time.perf_counter() - start) / repeats)
    return min(tries)


def profile(training, env, seconds):
    """Train for so long and print the table; `env` is one environment of the same task."""
    agent, config, run = training.agent, training.config, training.run
    while agent.low.updates < 2 * config.policy_delay * config.subgoal_steps:
        training.interact()
    small, large = config.batch_size, agent.config.num_candidates * config.subgoal_steps
    small_rate = flops_per_second(small, config.hidden, agent.device)
    large_rate = flops_per_second(small * large, config.hidden, agent.device)
    batch = agent.high_buffer.sample(config.batch_size)
    relabelling = flops(lambda: agent.correct(batch)) if config.correction else 0
    high = flops(agent.update_high, config.policy_delay) - relabelling
    obs = agent.tensor(training.obs)
    floors = {  # seconds per call
        "acting": flops(lambda: agent.low_action(obs, agent.hierarchy.subgoal, False)) / small_rate,
        "simulator": bare_simulator(env) * run.num_envs,
        "storing": 0.0,
        "low update": flops(agent.update_low, config.policy_delay) / small_rate,
        "relabelling": relabelling / large_rate,
        "high update": high / small_rate,
    }
    watch = Stopwatch(agent.device)
    for owner, method, part in (
        (agent, "act", "acting"),
        (training.envs, "step", "simulator"),
        (agent, "observe", "storing"),
        (agent, "update_low", "low update"),
        (agent, "update_high", "high update"),
        (agent, "correct", "relabelling"),
    ):
        watch.wrap(owner, method, part)
    start, first = watch.now(), training.step
    while (elapsed := watch.now() - start) < seconds:
        training.interact()
    steps = training.step - first

    print(f"{run.env}, {run.threads} thread(s), {run.num_envs} environment(s), {agent.device}")
    print(f"{steps:,} steps in {elapsed:.0f} s: {steps / elapsed:.1f} environment steps/s")
    print(f"float32 products: {small_rate / 1e9:.0f} GFLOP/s at {small} rows, ", end="")
    print(f"{large_rate / 1e9:.0f} at {small * large:,}")
    print(f"\n{'part':<16}{'ms per step':>12}{'floor':>10}")
    floor = 0.0
    for part in PARTS:
        least = floors[part] * watch.calls[part] / steps
        floor += least
        print(f"{part:<16}{1e3 * watch.seconds[part] / steps:>12.3f}{1e3 * least:>10.3f}")
    rest = elapsed - sum(watch.seconds.values())
    print(f"{'everything else':<16}{1e3 * rest / steps:>12.3f}{0:>10.3f}")
    print(f"{'total':<16}{1e3 * elapsed / steps:>12.3f}{1e3 * floor:>10.3f}")
    print(f"total / floor {elapsed / steps / floor:.2f}")
