"""What a run leaves behind and survives: config.json, progress.csv, policy.pt, checkpoints."""

import collections
import contextlib
import csv
import ctypes
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from harness.options import MAY_CHANGE, UserError, configs, find_task, flag
from hiro import HIROConfig

EVAL_COPIES = 50  # episodes evaluated side by side
CHECK_EVERY = 1_000  # steps between two looks at the losses and the clock
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM

# ---------------------------------------------------------------------- environments


def make_envs(task, num_envs, **kwargs):
    """num_envs copies of the task that wait to be reset, so that no final state is ever lost."""
    makers = [functools.partial(task, **kwargs)] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)


def reset_done(envs, obs, done):
    """Observations [N, obs] to act on: of a new episode where the old one is done."""
    return envs.reset(options={"reset_mask": done})[0] if done.any() else obs


# ---------------------------------------------------------------------- files


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


def load(path, what, format):
    """torch.load without the power to run code; UserError if the file is not what it should be."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the check sums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except Exception as error:  # damage shows in many ways
        reason = str(error).strip().split("\n")[0][:80]
        raise UserError(f"{path}: not a readable {what} ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != format:
        raise UserError(f"{path}: not a {what} of this version of the program")
    return state


POLICY, CHECKPOINT = ("policy", "hiro policy 2"), ("checkpoint", "hiro checkpoint 2")


def checkpoints(folder):
    """The checkpoint files of a run, newest first."""
    return sorted(folder.glob("checkpoint_*.pt"), reverse=True)


def newest(folder):
    """The newest checkpoint that can be read; None if the run was stopped before its first."""
    found = checkpoints(folder)
    for path in found:
        try:
            return load(path, *CHECKPOINT)
        except UserError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    if found:
        raise UserError(f"--resume {folder}: there is no readable checkpoint")
    return None


def save_json(path, content):
    text = json.dumps(content, indent=2)
    write_atomically(path, lambda file: file.write(text.encode()))


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


# ---------------------------------------------------------------------- starting, going on


def prepare(threads):
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # Adam's decaying moments would slow the CPU down a lot
    # glibc is to keep large blocks, not to hand them back to the kernel after every operation
    with contextlib.suppress(OSError, AttributeError):  # there may be no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def start(given, variant=None):
    """A new Run, for a new or empty folder."""
    settings, config = configs(given)
    if settings.run_dir is None:
        name = f"{settings.env.replace(':', '.')}_seed{settings.seed}"
        settings.run_dir = f"runs/{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = pathlib.Path(settings.run_dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another --run-dir, or --resume {folder}")
    saved = {
        "variant": variant,
        "preset": given.get("preset", "default"),
        "run": dataclasses.asdict(settings),
        "algorithm": dataclasses.asdict(config),
        "versions": versions(),
    }
    print(f"{settings.env}, seed {settings.seed}: all goes to {folder}")
    return Run(settings, config, folder, saved)


def resume(given, variant=None):
    """An interrupted Run, from its newest readable checkpoint."""
    folder = pathlib.Path(given.pop("resume"))
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: no run here (config.json is missing)")
    try:
        saved = json.loads((folder / "config.json").read_text())
        before = {"preset": saved["preset"], **saved["run"], **saved["algorithm"]}
        started, known = saved["versions"]["commit"], set(saved["algorithm"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--resume {folder}: config.json is damaged") from None
    check_variant(f"--resume {folder}", saved, variant)
    if other := known ^ {field.name for field in dataclasses.fields(HIROConfig)}:
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
    settings, config = configs({**before, **given, "run_dir": str(folder)})
    now = versions()
    for name, version in now.items():
        if version != (then := saved["versions"].get(name)):
            print(f"note: started with {name} {then}, now {version}")
    step = state["agent"]["steps"] if state else 0
    saved["run"] = dataclasses.asdict(settings)
    saved.setdefault("resumed", []).append({"step": step, **now})
    print(f"resumed at step {step:,}", flush=True)
    return Run(settings, config, folder, saved, state)


def check_variant(what, saved, variant):
    """Raise UserError if a saved run or policy is not of this agent: none but its own fits it."""
    if (other := saved.get("variant")) != variant:
        raise UserError(f"{what} is for {command(other)}")


def load_policy(path, variant=None):
    """What Run.report() wrote to a policy.pt; UserError if it is none, or of another agent."""
    saved = load(path, *POLICY)
    check_variant(path, saved, variant)
    return saved


def command(variant):
    return f"python results/variants.py {variant}" if variant else "python train.py"


def reached(folder):
    """The step of the last evaluation in progress.csv; 0 if there is none."""
    try:
        return int((folder / "progress.csv").read_text().split()[-1].split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


# ---------------------------------------------------------------------- a run


class Run:
    """A run's environments, clocks, metrics and files; the loop in train.py tells it what happens.

    settings  RunConfig; its fields are the run's attributes
    record    what goes into config.json
    state     of the checkpoint to go on from, if any
    """

    def __init__(self, settings, config, folder, record=None, state=None):
        self.__dict__.update(dataclasses.asdict(settings))
        self.config, self.folder, self.record, self.state = config, folder, record or {}, state
        self.task = find_task(self.env)
        self.envs = self.eval_envs = None  # begin() makes them, close() closes them
        self.stop = False  # a signal came,
        self.stopped = False  # and all is saved
        self.seconds = 0.0  # of training, earlier sittings of the run included
        self.sums, self.counts = {}, {}  # of metrics, since the last evaluation
        self.warnings = 0  # the simulator's
        self.best = None  # the policy with the best evaluation so far
        self.columns = [
            *("step", "seed", "success_rate", "return", "distance", "intrinsic_return"),
            *("relabelled", "seconds", "subgoal_progress", "low_q", "high_q"),
            *("train_success_rate", "train_distance"),
            *("low_critic_loss", "high_critic_loss", "low_saturation", "high_saturation"),
            *("simulator_warnings", *(f"chosen_{k}" for k in range(config.num_candidates))),
        ]
        if state and state["progress"].split("\n")[0] != ",".join(self.columns):
            problem = "its progress.csv has other columns; go on with the code it was started with"
            raise UserError(f"--resume {folder}: {problem}")
        prepare(self.threads)

    @contextlib.contextmanager
    def set_up(self):
        """Around making the agent: only when there is one the run gets its folder."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch's has the reason in its first line
            raise UserError(f"cannot set the run up: {str(error).splitlines()[0]}") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        save_json(self.folder / "config.json", self.record)

    PLAIN = ("seconds", "sums", "counts", "warnings", "best")  # saved as they are

    def begin(self, agent):
        """obs [N, obs], subgoal [N, d], clock [N] to go on from; a resumed agent gets its past."""
        self.agent, n = agent, self.num_envs
        more = {"privileged": True} if agent.privileged_dim else {}
        self.envs = make_envs(self.task, n, evaluate=False, **more)
        self.eval_envs = make_envs(self.task, min(self.eval_episodes, EVAL_COPIES), evaluate=True)
        for name in STOP_SIGNALS:
            signal.signal(name, self.interrupt)
        text = ",".join(self.columns) + "\n"
        if state := self.state:
            self.state = None  # it is as large as the replay buffers
            text = state["progress"]
            agent.load_state_dict(state["agent"])
            for env, its in zip(self.envs.envs, state["envs"], strict=True):
                env.set_state(its)
            for name in self.PLAIN:
                setattr(self, name, state[name])
            self.sums = {  # metrics are numbers, or tensors where the networks are
                name: value.to(agent.device) if torch.is_tensor(value) else value
                for name, value in self.sums.items()
            }
            live = [state[name].to(agent.device) for name in self.LIVE]
        else:
            obs, _ = self.envs.reset(seed=self.seed * n)  # no copy shares a stream
            subgoal = torch.zeros(n, len(agent.max_subgoal), device=agent.device)
            clock = torch.zeros(n, dtype=torch.long, device=agent.device)
            live = self.tensor(obs), subgoal, clock
        self.terminal = Terminal(self, text)
        self.clock = time.perf_counter()
        return live

    LIVE = ("obs", "subgoal", "clock")  # what the loop holds besides the agent

    def interrupt(self, *_):
        self.stop = True

    def goes_on(self):
        return self.agent.steps < self.total_steps and not self.stopped

    def tensor(self, array, dtype=torch.float32):
        return torch.as_tensor(array, dtype=dtype, device=self.agent.device)

    def env_step(self, action):
        """One step of every copy: next_obs [N, obs], reward, terminated, done [N] as tensors."""
        action = action.cpu().numpy()
        self.check_finite("action", action)
        next_obs, reward, terminated, truncated, info = self.envs.step(action)
        self.check_finite("state", next_obs)
        done = terminated | truncated
        for i in np.flatnonzero(done):
            success, distance = float(info["is_success"][i]), float(info["distance"][i])
            self.add_metrics("train", {"success_rate": success, "distance": distance})
        self.warnings += int(info["simulator_warnings"].sum())
        next_obs, reward, terminated = map(self.tensor, (next_obs, reward, terminated))
        return next_obs, reward, terminated, self.tensor(done, torch.bool)

    def reset_done(self, obs, done):
        """The observations to go on from: of a new episode where the old one is done."""
        return self.tensor(reset_done(self.envs, obs.cpu().numpy(), done.cpu().numpy()))

    # ------------------------------------------------------------------ metrics

    def add_metrics(self, source, metrics):
        """Count them in with the means of the next row."""
        for name, value in metrics.items():
            key = f"{source}_{name}"
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def due(self, every):
        """Whether the steps just made passed a multiple of `every`, or the end."""
        step = self.agent.steps
        return step // every > (step - self.num_envs) // every or step >= self.total_steps

    def check(self):
        """Now and then: are the losses still numbers, and how long will it take?"""
        if self.due(CHECK_EVERY):
            self.check_losses()
            self.terminal.status(self.agent.steps)

    def check_losses(self):
        for name, value in self.sums.items():
            if not torch.isfinite(torch.as_tensor(value)).all():
                raise self.broken(f"{name} is not finite")

    def check_finite(self, quantity, array):
        if not np.isfinite(array).all():
            raise self.broken(f"{quantity} is not finite")

    def broken(self, what):
        saved = checkpoints(self.folder)
        where = f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was saved"
        return UserError(f"step {self.agent.steps}: {what}; {where}")

    @contextlib.contextmanager
    def untimed(self):
        """Stops the clock of training."""
        self.seconds += time.perf_counter() - self.clock
        yield
        self.clock = time.perf_counter()

    # ------------------------------------------------------------------ saving

    @property
    def eval_seed(self):  # other episodes every time, the same in a rerun
        return (self.seed + 1) * 10**8 + self.agent.steps

    def report(self, evaluation):
        """A row of progress.csv, and policy.pt, from the means of an evaluation."""
        self.check_losses()
        step = self.agent.steps
        means = {key: value / self.counts[key] for key, value in self.sums.items()}
        chosen = means.pop("high_chosen", torch.full([self.config.num_candidates], math.nan))
        row = dict.fromkeys(self.columns, math.nan)
        row.update(evaluation)
        row.update({key: float(value) for key, value in means.items() if key in row})
        row.update({f"chosen_{k}": float(share) for k, share in enumerate(chosen)})
        row["relabelled"] = 1 - row["chosen_0"]
        row = {key: float(f"{value:.6g}") for key, value in row.items()}
        row.update(step=step, seed=self.seed, simulator_warnings=self.warnings)
        row["seconds"] = round(self.seconds)
        self.sums, self.counts = {}, {}

        latest = {"step": step, **evaluation, "policy": self.agent.policy.state_dict()}
        score = self.task.score, "return"
        if self.best is None or [latest[k] for k in score] >= [self.best[k] for k in score]:
            self.best = latest
        policy = {"format": POLICY[1], "env": self.env, "variant": self.record.get("variant")}
        policy |= {"latest": latest, "best": self.best}
        write_atomically(self.folder / "policy.pt", lambda file: torch.save(policy, file))
        self.terminal.row(row)

    def save(self, obs, subgoal, clock):
        """Write a checkpoint beside the older ones, then remove all but two."""
        self.check_losses()
        self.stopped = self.stop  # a signal from here on gets one more step and its own save
        for unfinished in self.folder.glob("checkpoint_*.pt.tmp"):  # killed in the middle of this
            unfinished.unlink()
        state = {
            "format": CHECKPOINT[1],
            "agent": self.agent.state_dict(),
            "envs": [env.get_state() for env in self.envs.envs],
            "progress": self.terminal.path.read_text(),
            **dict(zip(self.LIVE, (obs, subgoal, clock), strict=True)),
            **{name: getattr(self, name) for name in self.PLAIN},
        }
        path = self.folder / f"checkpoint_{self.agent.steps:012d}.pt"
        write_atomically(path, lambda file: torch.save(state, file))
        for old in checkpoints(self.folder)[2:]:
            old.unlink()

    def close(self):
        for envs in (self.envs, self.eval_envs):
            if envs is not None:
                envs.close()


class Terminal:
    """progress.csv, one row per evaluation, and the same numbers on 80 columns of the terminal."""

    TABLE = {
        **{"step": "{:,}", "success_rate": "{:.2f}", "return": "{:,.0f}", "distance": "{:.1f}"},
        **{"intrinsic_return": "{:,.0f}", "subgoal_progress": "{:.2f}"},
    }
    TITLES = ("step", "success", "return", "distance", "intrinsic", "progress", "steps/s")

    def __init__(self, run, text):
        """Make the file hold `text` and nothing else: rows after a checkpoint are lived again."""
        self.run, self.path = run, run.folder / "progress.csv"
        write_atomically(self.path, lambda file: file.write(text.encode()))
        rows = list(csv.DictReader(io.StringIO(text)))
        self.success_rate = float(rows[-1]["success_rate"]) if rows else None
        self.writer = None  # of TensorBoard scalars
        self.looks = collections.deque(maxlen=30)  # (seconds, step): the speed is over these
        self.told = -math.inf
        step, total, config = run.agent.steps, run.total_steps, run.config
        low, high = config.start_steps, max(config.start_steps, config.high_uniform_steps)
        if step >= total:
            print("the run is complete; --total-steps makes it longer")
        elif step <= high:
            print(f"learning begins after {low:,} steps, the high level's after {high:,}")
            if total <= low:
                print("nothing is learned: the run ends before")
        print("".join(f"{title:>11}" for title in self.TITLES), flush=True)
        self.speed(step)

    def speed(self, step):
        """Steps per second, lately."""
        self.looks.append((time.perf_counter(), step))
        (then, first), (now, last) = self.looks[0], self.looks[-1]
        return (last - first) / max(now - then, 1e-9)

    def row(self, row):
        line = io.StringIO()
        csv.DictWriter(line, self.run.columns, lineterminator="\n").writerow(row)
        with open(self.path, "a") as file:
            file.write(line.getvalue())
        self.success_rate = row["success_rate"]
        cells = [form.format(row[name]) for name, form in self.TABLE.items()]
        speed = self.speed(row["step"])
        print(clear_line() + "".join(f"{c:>11}" for c in [*cells, f"{speed:.0f}"]), flush=True)
        with contextlib.suppress(ImportError):  # TensorBoard is welcome, not required
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # purge: rows that a resumed run lives again replace those of the first time
                self.writer = SummaryWriter(self.run.folder, purge_step=row["step"])
            for name, value in row.items():
                if name not in ("step", "seed"):
                    group = name.split("_")[0] if name.startswith(GROUPS) else "evaluation"
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])
            self.writer.flush()

    def status(self, step):
        speed, now = self.speed(step), time.perf_counter()
        if not sys.stderr.isatty() and now - self.told < 300:  # a log gets a line in five minutes
            return
        self.told = now
        hours = (self.run.total_steps - step) / max(speed, 1e-9) / 3600
        left = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        text = f"step {step:,} of {self.run.total_steps:,} | {speed:.0f} steps/s | {left} left"
        if self.success_rate is not None:
            text += f" | success {self.success_rate:.2f}"
        end = "" if sys.stderr.isatty() else "\n"
        print(clear_line() + text, end=end, file=sys.stderr, flush=True)

    def end(self, step):
        folder, script = self.run.folder, command(self.run.record.get("variant"))
        if step < self.run.total_steps:
            print(f"{clear_line()}stopped at {step:,} steps; to go on: {script} --resume {folder}")
        if (folder / "policy.pt").exists():
            print(f"{clear_line()}next: {script} --eval-only {folder}/policy.pt")


GROUPS = ("train", "low", "high", "chosen")


def clear_line():
    return "\r\033[K" if sys.stderr.isatty() else ""
