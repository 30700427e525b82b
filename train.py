"""Train and evaluate HIRO: python train.py --env AntMaze. See --help, and README.md."""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import importlib.util
import io
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch

import envs as tasks
from hiro import HIRO, PRESETS, Hierarchy, HIROConfig, intrinsic_reward, option

EVAL_COPIES = 50  # episodes evaluated side by side
FINITE_EVERY = 1_000  # steps between two looks at the losses


@dataclass
class RunConfig:
    """Everything about a run that is not the algorithm."""

    env: str = option(None, "task: " + ", ".join(tasks.TASKS))
    seed: int = option(0, "of everything random in the run")
    total_steps: int = option(None, "environment steps to train for (default: the task's)")
    eval_every: int = option(50_000, "environment steps between evaluations (C.4)")
    eval_episodes: int = option(50, "episodes per evaluation, without noise (C.4)")
    checkpoint_every: int = option(50_000, "environment steps between checkpoints")
    num_envs: int = option(1, "N: environment copies stepped together")
    async_envs: bool = option(False, "step the copies in worker processes")
    threads: int = option(1, "CPU threads of the networks")
    device: str = option("cpu", "of the networks and buffers: cpu or cuda")
    run_dir: str = option(None, "output folder (default: runs/<env>_seed<seed>_<time>)")


BOTH_LEVELS = ("discount", "tau")  # flags that set the low and the high level's
EVAL_ONLY = {
    *("eval_only", "env", "seed", "eval_episodes", "threads", "device"),
    *("which", "plot", "video", "render"),
}
MAY_CHANGE = ("total_steps", "eval_every", "eval_episodes", "checkpoint_every")  # on --resume


class UserError(Exception):
    """A mistake that one line can explain; main() prints it and exits with status 2."""


# ---------------------------------------------------------------------- environments


def make_envs(run, num_envs, evaluate, **kwargs):
    """num_envs copies of the task that wait to be reset, so that no final state is ever lost."""
    # Worker processes must not die of a Ctrl-C that is meant to save the run.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return gymnasium.make_vec(
            f"hiro/{run.env}-v0",
            num_envs=num_envs,
            vectorization_mode="async" if run.async_envs and not evaluate else "sync",
            vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED},
            disable_env_checker=True,
            evaluate=evaluate,
            **kwargs,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def reset_done(envs, obs, done):
    """Observations [N, obs] to act on: of a new episode where the old one is done."""
    if not done.any():
        return obs
    fresh, _ = envs.reset(options={"reset_mask": done})
    return np.where(done[:, None], fresh, obs)


# ---------------------------------------------------------------------- evaluation


def play(agent, envs, seed, watch=None):
    """One episode in each of N environments, without noise: a list of N result dicts.

    watch  called before every step t as watch(t, obs [N, obs], subgoal [N, d])
    """
    n, c = envs.num_envs, agent.config.subgoal_steps
    hierarchy = Hierarchy(agent, n)
    totals = {name: np.zeros(n) for name in ("return", "intrinsic_return", "subgoal_progress")}
    results = [None] * n
    obs, _ = envs.reset(seed=seed)
    steps = 0
    while None in results:
        action = hierarchy.act(agent.tensor(obs), explore=False).cpu().numpy()
        subgoal = hierarchy.subgoal.cpu().numpy()
        if watch:
            watch(steps, obs, subgoal)
        next_obs, reward, terminated, truncated, info = envs.step(action)
        steps += 1
        intrinsic = intrinsic_reward(obs, subgoal, next_obs)
        totals["return"] += reward
        totals["intrinsic_return"] += intrinsic
        totals["subgoal_progress"] += np.linalg.norm(subgoal, axis=1) + intrinsic
        done = terminated | truncated
        for i in np.flatnonzero(done):
            if results[i] is None:
                results[i] = {name: float(total[i]) for name, total in totals.items()}
                results[i]["steps"] = steps
                results[i]["subgoal_progress"] *= c / steps
                results[i]["success_rate"] = float(info["is_success"][i])
                results[i]["distance"] = float(info["distance"][i])
        after = agent.tensor(next_obs), agent.tensor(done, torch.bool)
        hierarchy.advance(agent.tensor(obs), *after)
        obs = reset_done(envs, next_obs, done)
    return results


def rollouts(agent, envs, episodes, seed, watch=None):
    """A list of `episodes` result dicts, as many at a time as there are environments."""
    results = []
    while len(results) < episodes:
        results += play(agent, envs, seed + len(results), watch)
    return results[:episodes]


def evaluate(agent, envs, episodes, seed):
    """Means over `episodes` episodes without noise (C.4); leaves the agent as it was.

    returns  success_rate (at the last step), return, distance (final, m), intrinsic_return,
             subgoal_progress (how much nearer to its subgoal a segment ends, about metres)
    """
    return mean(rollouts(agent, envs, episodes, seed))


def mean(results):
    names = ("success_rate", "return", "distance", "intrinsic_return", "subgoal_progress")
    return {name: float(np.mean([result[name] for result in results])) for name in names}


# ---------------------------------------------------------------------- the run's files


def write_atomically(path, write):
    """Call write(file) on a file beside `path`, then rename: a kill leaves one of the two."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        temporary.unlink(missing_ok=True)
        reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0]
        raise UserError(f"cannot write {path}: {reason}; what was saved before is whole") from None


def checkpoints(folder):
    """The checkpoint files of a run, newest first."""
    return sorted(folder.glob("checkpoint_*.pt"), reverse=True)


def load(path, what):
    """torch.load without the power to run code; UserError if the file is not what it should be."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the check sums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except Exception as error:  # damage shows in many ways
        reason = str(error).strip().split("\n")[0][:80]
        raise UserError(f"{path}: not a readable {what} ({reason})") from None


def load_policy(path):
    policy = load(path, "policy")
    if not isinstance(policy, dict) or policy.get("format") != "hiro policy 1":
        raise UserError(f"{path}: not a policy.pt of this program")
    return policy


def versions():
    """What the numbers of a run depend on besides its arguments."""
    folder = pathlib.Path(__file__).resolve().parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    names = ("numpy", "torch", "gymnasium", "mujoco")
    found = {name: sys.modules[name].__version__ for name in names}
    return {"commit": commit, "python": platform.python_version(), **found, "cpu": cpu}


class Progress:
    """progress.csv, one row per evaluation, and the same numbers on the terminal."""

    TABLE = ("step", "success_rate", "return", "distance", "intrinsic_return", "subgoal_progress")

    def __init__(self, folder, columns):
        self.path = folder / "progress.csv"
        self.columns = columns
        self.success_rate = math.nan
        self.writer = None  # of TensorBoard scalars

    def start(self, text):
        """Make the file hold `text` and nothing else: rows behind a checkpoint are lived again."""
        write_atomically(self.path, lambda file: file.write(text.encode()))
        for row in csv.DictReader(io.StringIO(text)):
            self.success_rate = float(row["success_rate"])

    def header(self):
        print("  ".join(f"{name:>16}" for name in (*self.TABLE, "steps_per_second")), flush=True)

    def add(self, row, speed):
        line = io.StringIO()
        csv.DictWriter(line, self.columns, lineterminator="\n").writerow(row)
        with open(self.path, "a") as file:
            file.write(line.getvalue())
        self.success_rate = row["success_rate"]
        cells = [f"{row[name]:>16}" for name in self.TABLE]
        print(clear_line() + "  ".join([*cells, f"{speed:>16.0f}"]), flush=True)
        with contextlib.suppress(ImportError):  # TensorBoard is welcome, not required
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # purge: rows that a resumed run lives again replace those of the first time
                self.writer = SummaryWriter(self.path.parent, purge_step=row["step"])
            for name, value in row.items():
                self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()

    def status(self, step, total, speed):
        if sys.stderr.isatty():
            left = datetime.timedelta(seconds=round((total - step) / max(speed, 1e-9)))
            success = f"success {self.success_rate:.2f}"
            text = f"step {step:,} of {total:,} | {speed:.0f} steps/s | {left} left | {success}"
            print(clear_line() + text, end="", file=sys.stderr, flush=True)


def clear_line():
    return "\r\033[K" if sys.stderr.isatty() else ""


# ---------------------------------------------------------------------- training


class Training:
    """One run: the agent, its environments, its clocks and its files."""

    def __init__(self, run, config, folder):
        self.run, self.config, self.folder = run, config, folder
        self.envs = make_envs(run, run.num_envs, evaluate=False)
        self.eval_envs = make_envs(run, min(run.eval_episodes, EVAL_COPIES), evaluate=True)
        task = tasks.TASKS[run.env]
        self.agent = HIRO(task, config, run.num_envs, run.seed, run.device)
        self.obs, _ = self.envs.reset(seed=run.seed * run.num_envs)  # no copy shares a stream
        self.seconds = 0.0  # of training, earlier sittings of the run included
        self.owed = 0  # environment steps that still call for a turn to learn
        self.turns = 0  # to learn, so far
        self.sums, self.counts = {}, {}  # of metrics, since the last evaluation
        self.warnings = 0
        self.best = None  # the policy with the best evaluation so far
        self.stop = False
        self.clock = time.perf_counter()
        chosen = [f"chosen_{k}" for k in range(config.num_candidates)]
        self.columns = [
            *("step", "seed", "success_rate", "return", "distance", "intrinsic_return"),
            *("relabelled", "seconds", "subgoal_progress", "low_q", "high_q"),
            *("train_success_rate", "train_distance"),
            *("low_critic_loss", "high_critic_loss", "low_saturation", "high_saturation"),
            *("simulator_warnings", *chosen),
        ]
        self.progress = Progress(folder, self.columns)

    @property
    def step(self):
        """Environment steps so far, of all copies together."""
        return self.agent.steps

    def train(self):
        """The loop of the paper: act, step, store, learn; now and then evaluate and save."""
        run = self.run
        if self.step == 0:
            self.progress.start(",".join(self.columns) + "\n")
        self.progress.header()
        began, first = time.perf_counter(), self.step
        while self.step < run.total_steps and not self.stop:
            before = self.step
            self.interact()

            def due(every, before=before):
                return self.step // every > before // every or self.step >= run.total_steps

            if due(FINITE_EVERY):
                self.check_losses()
                self.progress.status(
                    self.step, run.total_steps, (self.step - first) / (time.perf_counter() - began)
                )
            if due(run.eval_every):
                self.evaluate()
            if due(run.checkpoint_every):
                self.save()
        if self.step < run.total_steps:  # stopped by a signal
            self.save()
            print(f"{clear_line()}stopped at step {self.step}; go on with --resume {self.folder}")

    def interact(self):
        """One step of every environment, and the gradient steps that it calls for."""
        run, agent = self.run, self.agent
        action = agent.act(self.obs)
        self.check_finite("action", action)
        try:
            next_obs, reward, terminated, truncated, info = self.envs.step(action)
        except (EOFError, ConnectionError):  # its end of the pipe is closed
            self.envs.closed = True  # or gymnasium would ask it for an answer before it goes
            raise self.broken("an environment process died") from None
        self.check_finite("state", next_obs)
        agent.observe(self.obs, action, reward, next_obs, terminated, truncated)
        self.obs = reset_done(self.envs, next_obs, terminated | truncated)
        for i in np.flatnonzero(terminated | truncated):
            success, distance = float(info["is_success"][i]), float(info["distance"][i])
            self.count("train", {"success_rate": success, "distance": distance})
        self.warnings += int(info["simulator_warnings"].sum())

        if self.step > self.config.start_steps and len(agent.high_buffer) > 0:
            self.owed += run.num_envs
            while self.owed >= self.config.update_every:
                self.owed -= self.config.update_every
                self.learn()

    def learn(self):
        """One low-level update, and at every c-th turn one high-level update.

        The high level learns from when the subgoals are its own: before, when nothing yet follows
        them, its actor would run into a corner of the range for good (Differs 3). The low level
        learns until it comes to rest (Differs 10).
        """
        self.turns += 1
        if not self.agent.low_rests:
            self.count("low", self.agent.update_low())
        own = self.step > self.config.high_uniform_steps
        if own and self.turns % self.config.subgoal_steps == 0:
            self.count("high", self.agent.update_high())

    def count(self, source, metrics):
        for name, value in metrics.items():
            key = f"{source}_{name}"
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def evaluate(self):
        self.check_losses()
        self.tick()
        run = self.run
        seed = (run.seed + 1) * 10**8 + self.step  # other episodes every time, the same in a rerun
        evaluation = evaluate(self.agent, self.eval_envs, run.eval_episodes, seed)
        means = {key: value / self.counts[key] for key, value in self.sums.items()}
        chosen = means.pop("high_chosen", torch.full([self.config.num_candidates], math.nan))
        row = dict.fromkeys(self.columns, math.nan)
        row.update(evaluation)
        row.update({key: float(value) for key, value in means.items() if key in row})
        row.update({f"chosen_{k}": float(share) for k, share in enumerate(chosen)})
        row["relabelled"] = 1 - row["chosen_0"]
        row = {key: float(f"{value:.6g}") for key, value in row.items()}
        row.update(step=self.step, seed=run.seed, simulator_warnings=self.warnings)
        row["seconds"] = round(self.seconds)
        self.sums, self.counts = {}, {}

        latest = {"step": self.step, **evaluation, **self.agent.policy_dict()}
        score = tasks.TASKS[run.env].score, "return"
        if self.best is None or [latest[k] for k in score] >= [self.best[k] for k in score]:
            self.best = latest
        policy = {
            "format": "hiro policy 1",
            "env": run.env,
            "config": dataclasses.asdict(self.config),
            "latest": latest,
            "best": self.best,
        }
        write_atomically(self.folder / "policy.pt", lambda file: torch.save(policy, file))
        self.progress.add(row, self.step / max(self.seconds, 1e-9))
        self.clock = time.perf_counter()  # evaluations are not training time

    def tick(self):
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def check_finite(self, quantity, array):
        if not np.isfinite(array).all():
            raise self.broken(f"{quantity} is not finite")

    def check_losses(self):
        for name, value in self.sums.items():
            if not torch.isfinite(torch.as_tensor(value)).all():
                raise self.broken(f"{name} is not finite")

    def broken(self, what):
        saved = checkpoints(self.folder)
        where = f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was saved"
        return UserError(f"step {self.step}: {what}; {where}")

    # ------------------------------------------------------------------ saving

    PLAIN = ("seconds", "owed", "turns", "sums", "counts", "warnings", "best")

    def save(self):
        """Write a checkpoint beside the older ones, then remove all but two."""
        for unfinished in self.folder.glob("checkpoint_*.pt.tmp"):  # killed in the middle of this
            unfinished.unlink()
        self.check_losses()
        self.tick()
        state = {
            "format": "hiro checkpoint 1",
            "agent": self.agent.state_dict(),
            "envs": list(self.envs.get_attr("snapshot")),
            "obs": torch.as_tensor(self.obs),
            "progress": self.progress.path.read_text(),
            **{name: getattr(self, name) for name in self.PLAIN},
        }
        path = self.folder / f"checkpoint_{self.step:012d}.pt"
        write_atomically(path, lambda file: torch.save(state, file))
        for old in checkpoints(self.folder)[2:]:
            old.unlink()

    def restore(self, state):
        """Continue where save() was called."""
        if state["progress"].split("\n")[0] != ",".join(self.columns):
            problem = "its progress.csv has other columns; go on with the code it was started with"
            raise UserError(f"--resume {self.folder}: {problem}")
        self.agent.load_state_dict(state["agent"])
        self.envs.set_attr("snapshot", state["envs"])
        self.obs = state["obs"].numpy()
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.sums = {
            name: value.to(self.agent.device) if torch.is_tensor(value) else value
            for name, value in self.sums.items()
        }
        self.progress.start(state["progress"])
        self.clock = time.perf_counter()


# ---------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def number(kind):
    """int or float from text; 1e6 and 1_000_000 are integers too."""

    def parse(text):
        if kind is float:
            return float(text)
        try:
            return int(text)
        except ValueError:
            value = float(text)
        if not value.is_integer():
            raise argparse.ArgumentTypeError(f"{text} is not a whole number")
        return int(value)

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def flag(name):
    """How a field is spelt on the command line."""
    return "--" + name.replace("_", "-")


def build_parser():
    parser = Parser(
        prog="train.py",
        description="HIRO (Nachum et al. 2018) on Ant Maze, Push, Fall, Gather and a point maze.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="hyperparameters (default: td3)")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a run exactly")
    parser.add_argument("--eval-only", metavar="POLICY", help="evaluate a policy.pt, train nothing")
    parser.add_argument("--plot", metavar="PNG", help="with --eval-only: paths seen from above")
    parser.add_argument(
        "--video", metavar="FILE", help="with --eval-only: one episode, .gif or .mp4"
    )
    parser.add_argument("--render", action="store_true", help="with --eval-only: in a window")
    parser.add_argument(
        "--profile",
        nargs="?",
        const=60.0,
        type=number(float),
        metavar="SECONDS",
        help="train for a minute, or SECONDS, and print where the time goes",
    )
    parser.add_argument("--which", choices=["best", "latest"], help="of policy.pt (default: best)")
    for name in BOTH_LEVELS:
        parser.add_argument(f"--{name}", type=number(float), help=f"--low-{name} and --high-{name}")
    for title, config in (("run", RunConfig), ("algorithm", HIROConfig)):
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(config):
            text = field.metadata["help"].replace("%", "%%")
            if field.default is not None:
                text += f" (default: {field.default})"
            if field.type is bool:
                group.add_argument(
                    flag(field.name), action=argparse.BooleanOptionalAction, help=text
                )
            else:
                kind = field.type if field.type is str else number(field.type)
                unit = field.type.__name__.upper()
                group.add_argument(flag(field.name), type=kind, help=text, metavar=unit)
    return parser


def parse(argv):
    """Flags as typed -> {field: value}, only what was given; raises UserError."""
    parts = [arg.partition("=") for arg in argv]
    argv = [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in parts
    ]
    parser = build_parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        spellings = [text for action in parser._actions for text in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], spellings, 1)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    given = vars(known)
    for name in BOTH_LEVELS:
        if name in given:
            value = given.pop(name)
            given = {f"low_{name}": value, f"high_{name}": value, **given}
    return given


def configs(given):
    """The run's and the algorithm's configuration from flags, preset and defaults."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    run = RunConfig(**{name: value for name, value in given.items() if name in names})
    if run.env not in tasks.TASKS:
        problem = "--env is missing" if run.env is None else f"--env {run.env} is unknown"
        raise UserError(f"{problem}; choose from {', '.join(tasks.TASKS)}")
    task = tasks.TASKS[run.env]
    names = {field.name for field in dataclasses.fields(HIROConfig)}
    chosen = {name: value for name, value in given.items() if name in names}
    config = HIROConfig(**{**PRESETS[given.get("preset", "td3")], **chosen}).for_task(task)
    if run.total_steps is None:
        run.total_steps = task.total_steps
    validate(run, config)
    return run, config


def validate(run, config):
    """Raise UserError, one line, for the first setting that cannot work."""

    def require(fine, name, rule):
        if not fine:
            source = config if hasattr(config, name) else run
            raise UserError(f"{flag(name)} {getattr(source, name)}: {rule}")

    for source in (run, config):
        for field in dataclasses.fields(source):
            value = getattr(source, field.name)
            if field.type in (int, float):
                rule = "must be a finite number, not negative"
                require(math.isfinite(value) and value >= 0, field.name, rule)
    require(run.seed < 2**63, "seed", "must be below 2^63")
    positive = "must be at least 1"
    for name in ("total_steps", "eval_every", "eval_episodes", "checkpoint_every", "num_envs"):
        require(getattr(run, name) >= 1, name, positive)
    require(1 <= run.threads <= 1024, "threads", "must be between 1 and 1024")
    for name in ("subgoal_steps", "batch_size", "hidden", "policy_delay", "update_every"):
        require(getattr(config, name) >= 1, name, positive)
    fractions = "low_discount", "high_discount", "low_tau", "high_tau", "low_relabel", "high_random"
    for name in fractions:
        require(getattr(config, name) <= 1, name, "must be between 0 and 1")
    for name in ("low_actor_lr", "low_critic_lr", "high_actor_lr", "high_critic_lr"):
        require(getattr(config, name) > 0, name, "must be positive")
    require(0 < config.high_relabel <= 1, "high_relabel", "must be above 0, at most 1")
    require(0 < config.rest_reach <= 1, "rest_reach", "must be a share above 0, at most 1")
    rule = f"must be 0, or more than --start-steps {config.start_steps}: the low level must learn"
    require(config.rest_step == 0 or config.rest_step > config.start_steps, "rest_step", rule)
    require(config.num_candidates >= 2, "num_candidates", "must be at least 2")
    require(config.units in ("range", "raw"), "units", "choose from range, raw")
    smaller = min(config.low_buffer_size, config.high_buffer_size)
    rule = f"must not exceed the replay buffers' size, {smaller}"
    require(config.batch_size <= smaller, "batch_size", rule)
    require(run.num_envs <= smaller, "num_envs", rule)
    require(run.device in ("cpu", "cuda"), "device", "choose from cpu, cuda")
    if run.device == "cuda":
        require(torch.cuda.is_available(), "device", "torch finds no CUDA device here; use cpu")


def prepare(run):
    torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)  # Adam's decaying moments would slow the CPU down a lot
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc, it need not learn
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # to keep large blocks rather than hand them
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD     # back to the kernel after every operation
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def start(given):
    """A new run: resolve, print and save the configuration."""
    run, config = configs(given)
    if run.run_dir is None:
        run.run_dir = f"runs/{run.env}_seed{run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = pathlib.Path(run.run_dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --run-dir, or --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        "preset": given.get("preset", "td3"),
        "run": dataclasses.asdict(run),
        "algorithm": dataclasses.asdict(config),
        "versions": versions(),
    }
    print(json.dumps(saved, indent=2), flush=True)
    training = build(run, config, folder)
    save_config(folder, saved)
    return training


def build(run, config, folder, state=None):
    """A run set up from a checkpoint's state, or from nothing."""
    prepare(run)
    try:
        training = Training(run, config, folder)
    except (RuntimeError, MemoryError) as error:  # torch's word for no memory is RuntimeError
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"cannot set the run up: {reason}") from None
    if state:
        training.restore(state)
    return training


def save_config(folder, saved):
    text = json.dumps(saved, indent=2)
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))


def resume(given):
    """An interrupted run, from its newest readable checkpoint."""
    folder = pathlib.Path(given.pop("resume"))
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: no run here (config.json is missing)")
    try:
        saved = json.loads((folder / "config.json").read_text())
        before = {"preset": saved["preset"], **saved["run"], **saved["algorithm"]}
        started, settings = saved["versions"]["commit"], set(saved["algorithm"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--resume {folder}: config.json is damaged") from None
    if other := settings ^ {field.name for field in dataclasses.fields(HIROConfig)}:
        raise UserError(
            f"--resume {folder}: started at commit {started}, when {', '.join(sorted(other))} "
            "was another setting or none; go on with the code of that commit"
        )
    for name, value in given.items():
        if name not in MAY_CHANGE and value != before.get(name, value):
            raise UserError(
                f"{flag(name)} {value} differs from the run's {before[name]}; "
                f"only {', '.join(map(flag, MAY_CHANGE))} may change"
            )
    state = newest(folder)
    if state is None and reached(folder) >= before["checkpoint_every"] + before["num_envs"]:
        raise UserError(f"--resume {folder}: its checkpoints are gone; start a new run elsewhere")
    if state and given.get("total_steps", math.inf) < (step := state["agent"]["steps"]):
        raise UserError(f"--total-steps {given['total_steps']}: the run is at {step} already")
    run, config = configs({**before, **given, "run_dir": str(folder)})
    training = build(run, config, folder, state)
    now = versions()
    for name, version in now.items():
        if version != (then := saved["versions"].get(name)):
            print(f"note: started with {name} {then}, now {version}")
    saved["run"] = dataclasses.asdict(run)
    saved.setdefault("resumed", []).append({"step": training.step, **now})
    save_config(folder, saved)
    print(f"resumed at step {training.step}", flush=True)
    if training.step >= run.total_steps:
        print("the run is complete; --total-steps makes it longer")
    return training


def reached(folder):
    """The step of the last evaluation in progress.csv; 0 if there is none."""
    try:
        return int((folder / "progress.csv").read_text().split()[-1].split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def newest(folder):
    """The newest checkpoint that can be read; None if the run was stopped before its first."""
    found = checkpoints(folder)
    for path in found:
        try:
            state = load(path, "checkpoint")
            if not isinstance(state, dict) or state.get("format") != "hiro checkpoint 1":
                raise UserError(f"{path}: not a checkpoint of this program")
            return state
        except UserError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    if found:
        raise UserError(f"--resume {folder}: there is no readable checkpoint")
    return None


def profile(given):
    """Print where the time of a run goes; leaves nothing behind."""
    from results import speed

    seconds = given.pop("profile")
    if not 0 < seconds < math.inf:
        raise UserError(f"--profile {seconds}: must be positive")
    for name in {"resume", "run_dir"} & given.keys():
        raise UserError(f"{flag(name)} does not go with --profile")
    with tempfile.TemporaryDirectory() as folder:
        run, config = configs({**given, "run_dir": folder})
        short = {name: n for name, n in speed.SHORT_START.items() if name not in given}
        config = dataclasses.replace(config, **short)
        training = build(run, config, pathlib.Path(folder))
        speed.profile(training, tasks.TASKS[run.env](), seconds)


def eval_only(given):
    """Print what a saved policy achieves; draw, film or show it if asked to."""
    for name in given.keys() - EVAL_ONLY:
        raise UserError(f"{flag(name)} does not go with --eval-only")
    path, figure, film = given.pop("eval_only"), given.pop("plot", None), given.pop("video", None)
    show = given.pop("render", False)
    policy = load_policy(path)
    if given.get("env", policy["env"]) != policy["env"]:
        raise UserError(f"--eval-only {path} is a policy for {policy['env']}, not {given['env']}")
    for name, file in (("plot", figure), ("video", film)):
        if file and not pathlib.Path(file).absolute().parent.is_dir():
            raise UserError(f"{flag(name)} {file}: there is no such folder")
    if film:
        check_video(film)
    if figure and show:
        raise UserError("--plot and --render do not go together")
    if show and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise UserError("--render needs a screen, and there is none here; --video needs none")
    if figure:
        plot = plotting(figure, policy["env"])
    run, config = configs({"env": policy["env"], **given, **policy["config"]})
    prepare(run)
    agent = HIRO(tasks.TASKS[run.env], config, seed=run.seed, device=run.device)
    chosen = policy[given.get("which", "best")]
    agent.load_policy_dict(chosen)
    print(f"{run.env}, trained for {chosen['step']:,} steps, {run.eval_episodes} episodes")

    copies = 1 if show else min(run.eval_episodes, EVAL_COPIES)
    window = dict(render_mode="human", width=800, height=800) if show else {}
    envs = make_envs(run, copies, evaluate=True, **window)
    watch = mark_subgoal(envs) if show else None
    if figure:
        watch = plot.Trace(envs, config.subgoal_steps)
    with rendering():
        results = rollouts(agent, envs, run.eval_episodes, run.seed, watch)
    for name, value in mean(results).items():
        print(f"{name:>18} {value:10.3f}")
    if figure:
        plot.trajectories(figure, tasks.TASKS[run.env](evaluate=True), watch.episodes(results))
        print(figure)
    if film:
        make_video(agent, run, film)
        print(film)


def plotting(path, task):
    """The module that draws, if it can draw this."""
    try:
        from matplotlib.figure import Figure

        from results import plot
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    known = Figure().canvas.get_supported_filetypes()
    if pathlib.Path(path).suffix[1:] not in known:
        raise UserError(f"--plot {path}: write one of {', '.join('.' + k for k in sorted(known))}")
    if not tasks.TASKS[task](evaluate=True).walls:
        raise UserError(f"--plot draws mazes, and {task} has none; see --video")
    return plot


def mark_subgoal(envs, after=lambda env: None):
    """A watch() for one environment that marks where the current subgoal lies."""
    env = envs.envs[0].unwrapped

    def watch(t, obs, subgoal):
        height = env.data.body("torso").xpos[2]
        place = np.append(obs[0, :2] + subgoal[0, :2], height)
        env.markers = [tasks.sphere(place, 0.4, (0.2, 0.4, 0.9, 0.8))]
        after(env)

    return watch


def make_video(agent, run, path):
    """One episode from above, at twice its speed; green the target, blue the current subgoal."""
    import imageio

    size = dict(width=640, height=640)
    envs = make_envs(run, 1, evaluate=True, render_mode="rgb_array", **size)
    frames = []
    with rendering():
        play(agent, envs, run.seed, mark_subgoal(envs, lambda env: frames.append(env.render())))
        envs.close()
    fps = 2 * tasks.AntMaze.metadata["render_fps"]  # twice as fast as life
    speed = {"duration": 1000 / fps, "loop": 0} if path.endswith(".gif") else {"fps": fps}
    imageio.mimwrite(path, frames, **speed)


def check_video(path):
    """Raise UserError for a film that could not be written, before an episode is played for it."""
    suffix = pathlib.Path(path).suffix
    if suffix not in (".gif", ".mp4"):
        raise UserError(f"--video {path}: write a .gif or an .mp4")
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError(f"--video {path}: for .mp4, pip install imageio[ffmpeg]; .gif works as is")


@contextlib.contextmanager
def rendering():
    """Turn what OpenGL, or its absence, throws into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_graphics_error(error):
            raise
        hint = "install EGL or OSMesa for --video, use a screen for --render; see MUJOCO_GL"
        raise UserError(f"cannot render here ({hint})") from None


def is_graphics_error(error):
    words = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return any(word in words for word in ("opengl", "egl", "glfw", "osmesa", "video_mode", "gl/"))


def main(argv=None):
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        if "eval_only" in given:
            return eval_only(given)
        for name in {"plot", "video", "render", "which"} & given.keys():
            raise UserError(f"{flag(name)} goes with --eval-only POLICY")
        if "profile" in given:
            return profile(given)
        training = resume(given) if "resume" in given else start(given)

        def stop(*_):
            training.stop = True

        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, stop)
        training.train()
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        print(f"train.py: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
