"""Where the time goes: python train.py --env AntMaze --profile [SECONDS] [flags].

Real training, for a minute by default. Beside each part's milliseconds per environment step stands
the least that they could be: its matrix products at the speed this machine reaches on one product
of batch_size rows (relabelling: of all candidates and steps, in the precision that is used), and
the simulator's bare mj_step, one copy after the other. On a GPU each part waits for the one before.
"""

import time

import mujoco
import torch
from torch.utils.flop_counter import FlopCounterMode

SHORT_START = dict(start_steps=1_000, low_uniform_steps=0, high_uniform_steps=0)
PARTS = ("acting", "simulator", "storing", "low update", "relabelling", "high update")


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
    while training.turns < 2 * config.policy_delay * config.subgoal_steps:
        training.interact()
    rows = config.batch_size, config.num_corrected * config.num_candidates * config.subgoal_steps
    dtype = torch.bfloat16 if agent.bfloat16 else torch.float32
    small = flops_per_second(rows[0], config.hidden, agent.device)
    large = flops_per_second(rows[1], config.hidden, agent.device, dtype)
    batch, obs = agent.high_buffer.sample(config.batch_size), agent.tensor(training.obs)
    batch["action"] = batch["subgoal"]
    updating = flops(lambda: agent.high.update(batch), config.policy_delay)
    relabelling = flops(agent.update_high, config.policy_delay) - updating
    high = flops(lambda: agent.high_action(obs, False)) / config.subgoal_steps
    acting = high + flops(lambda: agent.low_action(obs, agent.hierarchy.subgoal, False))
    low = flops(agent.update_low, config.policy_delay)
    segment = config.update_every * config.subgoal_steps
    floors = {  # seconds per environment step
        "acting": acting / run.num_envs / small,
        "simulator": bare_simulator(env),
        "storing": 0.0,
        "low update": 0.0 if agent.low_rests else low / config.update_every / small,
        "relabelling": relabelling / segment / large,
        "high update": updating / segment / small,
    }
    watch = Stopwatch(agent.device)
    for owner, method, part in (
        (agent, "act", "acting"),
        (agent, "high_action", "acting"),
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
    print(f"products: {small / 1e9:.0f} GFLOP/s at {rows[0]} rows, ", end="")
    print(f"{large / 1e9:.0f} at {rows[1]:,} ({str(dtype)[6:]})")
    print(f"\n{'part':<16}{'ms per step':>12}{'floor':>10}")
    for part in PARTS:
        print(f"{part:<16}{1e3 * watch.seconds[part] / steps:>12.3f}{1e3 * floors[part]:>10.3f}")
    floor = sum(floors.values())
    rest = elapsed - sum(watch.seconds.values())
    print(f"{'everything else':<16}{1e3 * rest / steps:>12.3f}{0:>10.3f}")
    print(f"{'total':<16}{1e3 * elapsed / steps:>12.3f}{1e3 * floor:>10.3f}")
    print(f"total / floor {elapsed / steps / floor:.2f}")
