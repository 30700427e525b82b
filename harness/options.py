"""Dataclasses to flags and back, and one clear line for whatever cannot work."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import math
import os
import pickle
import sys
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch

import envs as tasks
from hiro import PRESETS, HIROConfig, option


class UserError(Exception):
    """A mistake that one line can explain; one_line_errors() prints it and exits with status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Turn what a user can mend into one line and status 2; Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class RunConfig:
    """Everything about a run that is not the algorithm."""

    env: str = option(None, "task: " + ", ".join(tasks.TASKS) + ", or your own as module:Class")
    seed: int = option(0, "of everything random in the run", most=2**63 - 1)
    total_steps: int = option(None, "environment steps to train for (default: the task's)", 1)
    eval_every: int = option(50_000, "environment steps between evaluations (C.4)", 1)
    eval_episodes: int = option(50, "episodes per evaluation, without noise (C.4)", 1)
    checkpoint_every: int = option(50_000, "environment steps between checkpoints", 1)
    num_envs: int = option(1, "N: environment copies stepped together", 1)
    threads: int = option(1, "CPU threads of the networks", 1, 1024)
    device: str = option("cpu", "where networks and buffers live")
    run_dir: str = option(None, "output folder (default: runs/<env>_seed<seed>_<time>)")


CHOICES = {"units": ("range", "raw"), "device": ("cpu", "cuda")}
EVAL_ONLY = {  # flags that go with --eval-only, the last four with nothing else
    *("eval_only", "env", "seed", "eval_episodes", "threads", "device"),
    *("which", "plot", "video", "render"),
}
MAY_CHANGE = ("total_steps", "eval_every", "eval_episodes", "checkpoint_every")  # on --resume


def flag(name):
    """How a field is spelt on the command line."""
    return "--" + name.replace("_", "-")


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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def paths(argv, doc, what, nargs="+"):
    """The only arguments of a script in results/; with --help, print its docstring and exit."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar=what, nargs=nargs)
    return parser.parse_args(argv).path


def build_parser():
    parser = Parser(
        prog="train.py",
        description="HIRO (Nachum et al. 2018) on Ant Maze, Push, Fall, Gather, and on balls.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), help="default, or the paper's hyperparameters")
    add("--resume", metavar="RUN_DIR", help="continue a run exactly")
    add("--eval-only", metavar="POLICY", help="evaluate a policy.pt, train nothing")
    add("--which", choices=["latest", "best"], help="of a policy.pt's two (default: latest)")
    add("--plot", metavar="PNG", help="with --eval-only: paths seen from above")
    add("--video", metavar="FILE", help="with --eval-only: one episode, .gif or .mp4")
    add("--render", action="store_true", help="with --eval-only: in a window")
    for title, config in (("run", RunConfig), ("algorithm", HIROConfig)):
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(config):
            default, paper = field.default, PRESETS["paper"].get(field.name)
            text = field.metadata["help"].replace("%", "%%")
            notes = [] if default is None else [f"default: {default}"]
            notes += [] if paper in (None, default) else [f"paper: {paper}"]
            text += f" ({'; '.join(notes)})" if notes else ""
            kwargs = {"help": text}
            if field.type is bool:
                kwargs["action"] = argparse.BooleanOptionalAction
            elif field.name in CHOICES:
                kwargs["choices"] = CHOICES[field.name]
            else:
                kwargs["type"] = field.type if field.type is str else number(field.type)
                kwargs["metavar"] = "NAME" if field.name == "env" else field.type.__name__.upper()
            group.add_argument(flag(field.name), **kwargs)
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
    if "eval_only" in given:
        for name in given.keys() - EVAL_ONLY:
            raise UserError(f"{flag(name)} does not go with --eval-only")
    else:
        for name in sorted({"plot", "video", "render", "which"} & given.keys()):
            raise UserError(f"{flag(name)} goes with --eval-only POLICY")
    return given


def configs(given):
    """The run's and the algorithm's configuration from flags, preset and defaults."""
    run, chosen = (
        {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}
        for kind in (RunConfig, HIROConfig)
    )
    run = RunConfig(**run)
    task = find_task(run.env)
    if run.env not in tasks.TASKS:
        check_task(run.env, task)
    config = HIROConfig(**{**PRESETS[given.get("preset", "default")], **chosen}).for_task(task)
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
            value, least, most = getattr(source, field.name), *map(field.metadata.get, BOUNDS)
            if field.type in (int, float):
                fine = math.isfinite(value) and least <= value <= most
                require(fine, field.name, f"must be {interval(least, most)}")
    segment = config.subgoal_steps * run.num_envs
    rule = f"must be at least {segment}, the steps of a first segment"
    require(config.start_steps >= segment, "start_steps", rule)
    rule = f"must not exceed the replay buffers' size, {config.buffer_size}"
    require(run.num_envs <= config.buffer_size, "num_envs", rule)
    if run.device == "cuda":
        require(torch.cuda.is_available(), "device", "torch finds no CUDA device here; use cpu")


BOUNDS = ("least", "most")


def interval(least, most):
    """In words; a least value below any that one would choose stands for "positive"."""
    if 0 < least < 1:
        return "positive" if most == math.inf else f"above 0, at most {most}"
    if most == math.inf:
        return f"at least {least}, and finite"
    return f"between {least} and {most}"


# ---------------------------------------------------------------------- tasks


NEEDED = (  # attributes of a task's class; envs.py says what they are
    *("state_dim", "privileged_dim", "action_dim", "low_blind", "max_subgoal"),
    *("observation_scale", "action_unit", "high_reward_scale", "score"),
    *("reward_lasts", "total_steps", "high_uniform_steps", "get_state", "set_state"),
)


def find_task(name):
    """The class of a task: one of ours, or module:Class from the folder the program runs in."""
    if name is None:
        raise UserError(f"--env is missing; choose from {', '.join(tasks.TASKS)}")
    if name in tasks.TASKS:
        return tasks.TASKS[name]
    module, colon, attribute = name.partition(":")
    if not colon or module[:1] in ("", "."):
        near = difflib.get_close_matches(name, tasks.TASKS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(tasks.TASKS)}"
        raise UserError(f"--env {name} is unknown; {hint}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--env {name}: {error}") from None


def check_task(name, task):
    """Raise UserError for what a foreign task lacks, before hours have gone into it."""

    def require(fine, what):
        if not fine:
            raise UserError(f"--env {name} {what}")

    require(isinstance(task, type) and issubclass(task, gymnasium.Env), "is no gymnasium.Env")
    missing = [part for part in NEEDED if not hasattr(task, part)]
    require(not missing, f"lacks {', '.join(missing)}; envs.py says what they are")
    fine = task.score in ("success_rate", "return")
    require(fine, f"has score {task.score}, which is neither success_rate nor return")
    wanted = {"evaluate": True, "render_mode": None}
    if task.privileged_dim:
        wanted["privileged"] = True
    try:
        env = task(**wanted)
    except TypeError as error:
        require(False, f"must take {', '.join(wanted)} ({error})")
    obs, _ = env.reset(seed=0)
    missing = [part for part in ("observation_space", "action_space") if not hasattr(env, part)]
    require(not missing, f"lacks {', '.join(missing)}")
    found = env.action_space.shape
    require(found == (task.action_dim,), f"acts in {found}, action_dim says ({task.action_dim},)")
    box = gymnasium.spaces.Box(-1, 1, (task.action_dim,), env.action_space.dtype)
    require(env.action_space == box, f"has action_space {env.action_space}, not {box}")
    *_, info = env.step(np.zeros(task.action_dim, np.float32))
    missing = {"is_success", "distance", "simulator_warnings"} - info.keys()
    require(not missing, f"leaves {', '.join(sorted(missing))} out of info")
    expected = (len(task.observation_scale) + task.privileged_dim,)
    says = f"observation_scale and privileged_dim say {expected}"
    for found in (np.shape(obs), env.observation_space.shape):
        require(found == expected, f"observes {found}, {says}")
    saved = io.BytesIO()
    torch.save(env.get_state(), saved)
    try:
        env.set_state(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    except pickle.UnpicklingError:
        require(False, "has a get_state() of more than plain numbers, lists and dicts")
    env.close()
