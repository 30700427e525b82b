"""Tests of what a run stands in: kills, resumes, bad input, files, the terminal, pictures."""

import contextlib
import copy
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import envs as tasks
import train
from harness import options, runs
from hiro import HIRO, PRESETS, HIROConfig, Policy

ROOT = pathlib.Path(train.__file__).resolve().parent
torch.set_num_threads(1)


class Ball(tasks.PointMaze):
    """PointMaze with short episodes, and a simulator that warns at every seventh step."""

    max_steps = 70

    def _info(self):
        return {**super()._info(), "simulator_warnings": int(self.steps % 7 == 0)}


@pytest.fixture(scope="module", autouse=True)
def ball():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "Ball", Ball)
        yield


def main(*args):
    """python train.py ARGS, in this process: exit status, stdout, stderr."""
    handlers = {name: signal.getsignal(name) for name in runs.STOP_SIGNALS}
    out, err, code = io.StringIO(), io.StringIO(), 0
    for name in handlers:  # a run that misses one ends with 130, in the background too
        signal.signal(name, signal.default_int_handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.main(" ".join(map(str, args)).split())
    except SystemExit as stop:
        code = stop.code
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return code, out.getvalue(), err.getvalue()


def one_line(*args):
    """What main() says when it ends with status 2, which must be one line."""
    code, _, err = main(*args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


SMALL = "--env Ball --hidden 16 --batch-size 8 --eval-episodes 2 "
IDLE = SMALL + "--start-steps 1000 "  # too short a run to learn
# Checkpoints at 147, 294 and 441 fall within episodes and segments; both buffers are full by then.
RUNS = {"one": SMALL + "--start-steps 40 --low-uniform-steps 100 --high-uniform-steps 150 "}
RUNS["one"] += "--buffer-size 10 --total-steps 500 --eval-every 170 --checkpoint-every 147 "
RUNS["three"] = RUNS["one"] + "--num-envs 3 --high-update-every 2 "


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Runs that nothing interrupts."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in ("one", "three")}
    for name, folder in folders.items():
        assert main(RUNS[name], "--run-dir", folder)[0] == 0
    return folders


@pytest.fixture(scope="module")
def whole_run(whole_runs):
    return whole_runs["one"]


@pytest.fixture
def folder(whole_run, tmp_path):
    """A copy of a finished run, to be spoilt."""
    return shutil.copytree(whole_run, tmp_path / "run")


def rows(folder, without=()):
    with open(folder / "progress.csv") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def steps(folder):
    return [int(row["step"]) for row in rows(folder)]


def saved_at(folder):
    """The steps of the checkpoints, newest first."""
    return [int(path.stem.split("_")[1]) for path in runs.checkpoints(folder)]


def checkpoint(folder):
    return torch.load(runs.checkpoints(folder)[0], weights_only=True)


def assert_same(a, b, path=""):
    """Bit-identical nested dicts, lists, tensors and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype, path
        assert np.array_equal(a.numpy(), b.numpy(), equal_nan=True), path
    else:
        assert a == b or (a != a and b != b), path


def assert_same_run(folder, whole):
    """The same but for the time it took: rows, weights, optimizers, buffers, generators, policy."""
    assert rows(folder, ["seconds"]) == rows(whole, ["seconds"])
    states = [checkpoint(each) for each in (folder, whole)]
    for state in states:
        del state["seconds"], state["progress"]
    assert_same(*states)
    assert_same(*(torch.load(each / "policy.pt", weights_only=True) for each in (folder, whole)))


class Killed(BaseException):
    pass


def at_step(patch, step, act):
    """Call act(run) before the first step of the loop after this one."""
    goes_on, pending = runs.Run.goes_on, [act]

    def watched(run):
        if run.agent.steps >= step and pending:
            pending.pop()(run)
        return goes_on(run)

    patch.setattr(runs.Run, "goes_on", watched)


def kill(run):
    raise Killed


# ------------------------------------------------------------ kills and resumes


@pytest.mark.parametrize("name, how", [("one", signal.SIGTERM), ("three", signal.SIGINT)])
def test_a_run_killed_and_stopped_equals_an_uninterrupted_one(name, how, tmp_path, whole_runs):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 200, kill)
        main(RUNS[name], "--run-dir", folder)
    # The evaluation at 170 is in the file, but after the last checkpoint: it is lived again.
    assert (len(steps(folder)), saved_at(folder)) == (1, [147])

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 400, lambda run: signal.raise_signal(how))
        code, out, _ = main("--resume", folder)
    stopped = saved_at(folder)[0]
    assert code == 0 and "resumed at step 147" in out and 400 < stopped <= 405
    assert f"stopped at {stopped} steps; to go on: python train.py --resume {folder}" in out

    assert main("--resume", folder)[0] == 0
    assert_same_run(folder, whole_runs[name])
    config = json.loads((folder / "config.json").read_text())
    assert [resumed["step"] for resumed in config["resumed"]] == [147, stopped]
    assert config["resumed"][0].items() >= config["versions"].items()


def test_ctrl_c_before_the_first_step_ends_without_a_traceback(monkeypatch):
    monkeypatch.setattr(runs, "start", lambda *given: signal.raise_signal(signal.SIGINT))
    assert main(IDLE) == (130, "", "")


def test_a_run_stopped_before_its_first_checkpoint_starts_again(folder, whole_run):
    for path in runs.checkpoints(folder):
        path.unlink()
    (folder / "progress.csv").write_text("step,seed\n")
    code, out, _ = main("--resume", folder)
    assert code == 0 and "resumed at step 0" in out
    assert_same_run(folder, whole_run)


def test_a_run_whose_checkpoints_were_deleted_is_not_overwritten(folder):
    for path in runs.checkpoints(folder):
        path.unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "checkpoints are gone" in one_line("--resume", folder, "--total-steps 10_000")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", ["cut short", "one byte"])
def test_two_checkpoints_are_kept_and_a_damaged_newest_one_falls_back(damage, folder, whole_run):
    assert saved_at(folder) == [500, 441]
    newest = runs.checkpoints(folder)[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data if damage == "one byte" else data[:-1000])
    code, out, err = main("--resume", folder)
    assert code == 0 and newest.name in err and "trying the one before" in err
    assert "resumed at step 441" in out
    assert_same_run(folder, whole_run)


def test_without_a_readable_checkpoint_nothing_is_resumed(folder):
    newest, older = runs.checkpoints(folder)
    newest.write_bytes(b"damaged")
    torch.save({"foreign": 1}, older)
    code, _, err = main("--resume", folder)
    first, second, last = err.splitlines()
    assert newest.name in first and older.name in second and "no readable checkpoint" in last
    assert code == 2


def test_a_finished_run_goes_on_with_more_steps(tmp_path, whole_run):
    short = tmp_path / "short"
    assert main(RUNS["one"], "--total-steps 300 --run-dir", short)[0] == 0
    (short / "checkpoint_000000000123.pt.tmp").write_bytes(b"killed here")
    code, out, _ = main("--resume", short)
    assert code == 0 and "the run is complete; --total-steps makes it longer" in out
    assert main("--resume", short, "--total-steps 500")[0] == 0
    assert steps(short) == [170, 300, 340, 500]  # 300: the shorter run's last
    assert_same(checkpoint(short)["agent"], checkpoint(whole_run)["agent"])
    assert json.loads((short / "config.json").read_text())["run"]["total_steps"] == 500
    assert not list(short.glob("*.tmp")), "the next checkpoint removes an unfinished one"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_resume_says_what_is_not_as_it_was(folder):
    edit(folder / "config.json", lambda config: config["versions"].update(cpu="abacus"))
    code, out, _ = main("--resume", folder)
    assert code == 0 and "started with cpu abacus, now" in out and out.count("started with") == 1


def test_resume_refuses_settings_that_another_version_did_not_have(folder):
    edit(folder / "config.json", lambda config: config["algorithm"].pop("high_random_first"))
    before = (folder / "config.json").read_bytes()
    assert "high_random_first was another setting" in one_line(
        "--resume", folder, "--total-steps 600"
    )
    assert (folder / "config.json").read_bytes() == before


def test_resume_refuses_other_columns(folder):
    torch.save({**checkpoint(folder), "progress": "step,seed\n"}, runs.checkpoints(folder)[0])
    assert "other columns" in one_line("--resume", folder, "--total-steps 600")


def test_a_simulation_that_blows_up_says_so_and_is_not_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it runs
    env = tasks.AntMaze()
    env.reset(seed=0)
    env.data.warning.number[:] = 1  # of an earlier step
    assert env.step(np.zeros(8))[4]["simulator_warnings"] == 0
    env.data.qvel[0] = 1e12
    obs, *_, info = env.step(np.zeros(8))
    assert info["simulator_warnings"] > 0 and not np.abs(obs[:2]).max() < 1e9


@pytest.mark.parametrize(
    "what, owner, name, every",
    [
        ("action", HIRO, "low_action", 1000),
        ("state", Ball, "_state", 1000),
        ("low_q", HIRO, "update_low", 1000),  # seen before a checkpoint,
        ("low_q", HIRO, "update_low", 170),  # and before an evaluation is written down
    ],
)
def test_anything_not_finite_ends_the_run(what, owner, name, every, tmp_path, monkeypatch):
    original, nan = getattr(owner, name), torch.tensor(math.nan)

    def spoilt(self, *args):  # steps of the agent or, as there is one long episode, of the world
        result = original(self, *args)
        if self.steps < 160:
            return result
        return {**result, "q": nan} if name == "update_low" else result + math.nan

    monkeypatch.setattr(owner, name, spoilt)
    monkeypatch.setattr(Ball, "max_steps", 1000)
    folder = tmp_path / "run"
    err = one_line(RUNS["one"], f"--eval-every {every} --run-dir {folder}")
    assert f"{what} is not finite; the last good checkpoint is " in err
    assert "checkpoint_000000000147.pt" in err and (saved_at(folder), steps(folder)) == ([147], [])


@pytest.mark.parametrize("name, step", [("report", 340), ("save", 441)])
def test_a_full_disk_is_one_line_and_costs_nothing_saved(name, step, tmp_path, monkeypatch):
    """A limit on the size of files stands for the full disk: writing fails half way through."""
    folder, write = tmp_path / "run", getattr(runs.Run, name)

    def limited(run, *args):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if run.agent.steps >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            write(run, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(runs.Run, name, limited)
    err = one_line(RUNS["one"], "--run-dir", folder)
    assert "File too large; what was saved before is whole" in err
    assert saved_at(folder) == [294, 147] and not list(folder.glob("*.tmp"))
    latest = torch.load(folder / "policy.pt", weights_only=True)["latest"]
    assert latest["step"] == (170 if name == "report" else 340)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    """SIGKILL whenever it falls; every checkpoint stays readable and the run ends as if alone."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    args = RUNS["one"].replace("Ball", "PointMaze") + "--checkpoint-every 10 --run-dir "
    assert main(args, whole)[0] == 0
    random = np.random.default_rng(0)
    progress = [0]
    for _ in range(20):
        started = (folder / "config.json").exists()
        line = f"--resume {folder}" if started else f"{args} {folder}"
        command = [sys.executable, str(ROOT / "train.py"), *line.split()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while max(saved_at(folder), default=0) <= progress[-1] and process.poll() is None:
            time.sleep(0.002)  # until it has made a step forward; then any moment will do
        time.sleep(random.uniform(0, 0.08))
        process.kill()
        process.wait()
        for path in runs.checkpoints(folder):
            torch.load(path, weights_only=True)
        progress.append(saved_at(folder)[0])
    assert all(now > before or now == 500 for before, now in itertools.pairwise(progress))
    assert main("--resume", folder)[0] == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PointMaze", "PointPush"])
def test_a_ball_is_learned_from_scratch(name, tmp_path):
    line = f"--env {name} --eval-every 10000 --seed 9 --run-dir {tmp_path}/run"
    subprocess.run([sys.executable, str(ROOT / "train.py"), *line.split()], check=True)
    assert float(rows(tmp_path / "run")[-1]["success_rate"]) >= 0.9


# ------------------------------------------------------------ what a run leaves behind


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_a_short_run_of_every_task_leaves_its_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.TASKS[name], "max_steps", 20)
    folder = tmp_path / "run"
    line = SMALL.replace("Ball", name) + "--start-steps 30 --num-envs 3 --total-steps 60 --seed 5"
    assert main(line, "--run-dir", folder)[0] == 0
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["checkpoint_000000000060.pt", "config.json", "policy.pt", "progress.csv"]
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["env"] == name and config["algorithm"]["hidden"] == 16
    versions = {"commit", "python", "numpy", "torch", "gymnasium", "mujoco", "cpu"}
    assert config["versions"].keys() == versions and config["preset"] == "default"
    (row,) = rows(folder)
    assert row["step"] == "60" and row["seed"] == "5"
    # The low level has learned; the high level waits for the task's high_uniform_steps to be over.
    names = ("low_q", "train_distance", "high_q", "relabelled", "chosen_3")
    assert [row[name] == "nan" for name in names] == [False, False, True, True, True]
    saved = torch.load(folder / "policy.pt", weights_only=True)
    assert saved["env"] == name and saved["latest"]["step"] == saved["best"]["step"] == 60
    for column in ("success_rate", "return", "distance"):
        assert math.isclose(saved["latest"][column], float(row[column]), rel_tol=1e-5)


def test_every_seed_and_every_copy_has_its_own_luck(tmp_path, monkeypatch):
    evaluated, states, evaluate = [], [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluated.append(a[3]) or evaluate(*a))
    for seed in (1, 2):
        line = f"{IDLE} --seed {seed} --num-envs 3 --total-steps 30 --eval-every 10 --run-dir"
        assert main(line, tmp_path / str(seed))[0] == 0
        states.append(checkpoint(tmp_path / str(seed)))
    assert len(set(evaluated)) == len(evaluated) == 6
    streams = [env["random"]["state"]["inc"] for state in states for env in state["envs"]]
    assert len(set(streams)) == 6, "numpy's constant of a stream"
    first, second = (state["agent"] for state in states)
    assert not torch.equal(first["generator"], second["generator"])
    weights = [agent["low"]["actor"]["net.0.weight"] for agent in (first, second)]
    assert not torch.equal(*weights)
    # A buffer for 200,000 transitions of which 30 are in use makes a small file.
    assert runs.checkpoints(tmp_path / "1")[0].stat().st_size < 300_000


def test_shares_of_candidates_add_up_and_without_the_correction_are_left_empty(whole_run, tmp_path):
    for row in rows(whole_run):
        shares = [float(row[f"chosen_{k}"]) for k in range(10)]
        assert math.isclose(sum(shares), 1, abs_tol=1e-4)
        assert math.isclose(sum(shares[1:]), float(row["relabelled"]), abs_tol=1e-5)
    line = "--no-correction --total-steps 200 --eval-every 200 --run-dir"
    assert main(RUNS["one"], line, tmp_path / "run")[0] == 0
    (row,) = rows(tmp_path / "run")
    assert row["relabelled"] == row["chosen_3"] == "nan" and row["high_q"] != "nan"


def test_simulator_warnings_are_summed_over_the_whole_run(whole_runs):
    """Each copy warns at every seventh step; interrupted runs are compared with these elsewhere."""
    for name, counts in (("one", ["24", "48", "71"]), ("three", ["24", "48", "69"])):
        assert [row["simulator_warnings"] for row in rows(whole_runs[name])] == counts


def test_training_episodes_are_counted_at_their_last_step(tmp_path, monkeypatch):
    last, step = [], Ball.step

    def watched(env, action):
        *result, info = step(env, action)
        if env.steps == 70 and not env.evaluate:
            last.append(info["distance"])
        return *result, info

    monkeypatch.setattr(Ball, "step", watched)
    monkeypatch.setattr(Ball, "success_distance", 12.0)
    line = "--num-envs 2 --total-steps 300 --eval-every 300 --run-dir"
    assert main(IDLE, line, tmp_path / "run")[0] == 0
    (row,) = rows(tmp_path / "run")
    success_rate = np.mean([distance < 12 for distance in last])
    assert len(last) == 4 and 0 < success_rate < 1
    assert math.isclose(float(row["train_distance"]), np.mean(last), rel_tol=1e-5)
    assert float(row["train_success_rate"]) == success_rate


class Clock:
    """A time that passes only where a test says so."""

    def __init__(self, patch):
        self.now, self.patch = 5000.0, patch
        patch.setattr(runs, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def charge(self, owner, name, seconds):
        original = getattr(owner, name)

        def slower(*args):
            self.now += seconds
            return original(*args)

        self.patch.setattr(owner, name, slower)


def test_seconds_are_those_of_training_alone(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    clock.charge(runs.Run, "env_step", 2)
    clock.charge(train, "evaluate", 1000)
    clock.charge(runs, "write_atomically", 100_000)
    line = "--total-steps 30 --eval-every 10 --checkpoint-every 15 --run-dir"
    assert main(IDLE, line, tmp_path / "run")[0] == 0
    assert main("--resume", tmp_path / "run", "--total-steps 50")[0] == 0
    assert [row["seconds"] for row in rows(tmp_path / "run")] == ["20", "40", "60", "80", "100"]


# What six evaluations find: (success_rate, return), at steps 10, 20 ... 60
FOUND = [(0.2, -5), (0.6, -9), (0.6, -7), (0.6, -7), (0.6, -8), (0.1, -1)]


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations find FOUND, then the worst; the policies that were evaluated are kept."""
    found, policies = itertools.chain(FOUND, itertools.repeat((0.0, -1000))), []

    def evaluate(policy, envs, episodes, seed, watch=None):
        policies.append(copy.deepcopy(policy.state_dict()))
        success, total = next(found)
        rest = {"distance": 1.0, "intrinsic_return": 2.0, "subgoal_progress": 3.0, "steps": 4}
        return [{"success_rate": success, "return": total, **rest}]

    monkeypatch.setattr(train, "evaluate", evaluate)
    return policies


LEARNING = SMALL + "--start-steps 10 --total-steps 60 --eval-every 10 "


@pytest.mark.parametrize("score, best", [("success_rate", 40), ("return", 60)])
def test_the_best_policy_is_kept_and_played(score, best, scripted, tmp_path, monkeypatch):
    """Success first, then return, the later of equals; by return alone where that is the score."""
    monkeypatch.setattr(Ball, "score", score)
    assert main(LEARNING, "--run-dir", tmp_path / "run")[0] == 0
    assert main("--resume", tmp_path / "run", "--total-steps 70")[0] == 0, "and over a resume"
    path = tmp_path / "run" / "policy.pt"
    saved = torch.load(path, weights_only=True)
    assert (saved["latest"]["step"], saved["best"]["step"]) == (70, best)
    assert (saved["best"]["success_rate"], saved["best"]["return"]) == FOUND[best // 10 - 1]
    for which, step, line in (("latest", 70, ""), ("best", best, "--which best")):
        expected = scripted[step // 10 - 1]
        assert_same(saved[which]["policy"], expected)
        assert_same(Policy.load(path, which).state_dict(), expected)
        code, out, _ = main("--eval-only", path, line)
        assert code == 0 and f"trained for {step} steps" in out
        assert_same(scripted[-1], expected)


# ------------------------------------------------------------ the terminal, TensorBoard


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_the_terminal_says_what_happens(tmp_path, scripted):
    _, out, _ = main(LEARNING, "--high-uniform-steps 30 --run-dir", tmp_path / "run")
    first, second, titles, *table, last = out.splitlines()
    assert first == f"Ball, seed 0: all goes to {tmp_path}/run"
    assert second == "learning begins after 10 steps, the high level's after 30"
    assert titles.split() == "step success return distance intrinsic progress steps/s".split()
    assert table[2].split()[:6] == ["30", "0.60", "-7", "1.0", "2", "3.00"] and len(table) == 6
    assert f"python train.py --eval-only {tmp_path}/run/policy.pt" in last
    for end, nothing in ((10, True), (11, False)):
        line = f"--high-uniform-steps 30 --total-steps {end} --run-dir {tmp_path / str(end)}"
        out = main(LEARNING, line)[1]
        assert ("nothing is learned: " in out) == nothing
        assert max(map(len, out.splitlines()[1:4])) <= 80
    assert "learning begins" not in main("--resume", tmp_path / "run", "--total-steps 70")[1]


def test_lines_stay_within_eighty_columns(tmp_path, monkeypatch):
    """The widest numbers that a run comes to, on a screen and in a log."""
    clock = Clock(monkeypatch)
    config = HIROConfig(start_steps=10**6, high_uniform_steps=10**7)
    row = dict.fromkeys(runs.Terminal.TABLE, -123456.789)
    row |= {"success_rate": 1.0, "subgoal_progress": -12.34}
    run = dict(folder=tmp_path, columns=list(row), config=config, total_steps=10**7)
    run = types.SimpleNamespace(**run, agent=types.SimpleNamespace(steps=0))
    for screen in (Screen(), io.StringIO()):
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            terminal = runs.Terminal(run, ",".join(row) + "\n")
            for step in (1_000, 2_000, 3_000, 10**7):
                clock.now += 1_000 / 20  # twenty steps per second
                terminal.row({**row, "step": step})
                terminal.status(step)
        lines = re.split("\r\x1b\\[K|\n", screen.getvalue())
        assert max(map(len, lines)) <= 80, lines
        assert sum("steps/s |" in line for line in lines) == (4 if screen.isatty() else 1)


def test_without_a_terminal_a_status_line_appears_now_and_then(tmp_path, scripted, monkeypatch):
    clock = Clock(monkeypatch)
    clock.charge(runs.Run, "env_step", 0.5)
    monkeypatch.setattr(runs, "CHECK_EVERY", 250)  # a look in 125 s, a line in 300
    line = "--total-steps 1200 --eval-every 700 --start-steps 9999 --run-dir"
    _, out, err = main(IDLE, line, tmp_path / "run")
    first, second = err.splitlines()
    assert first == "step 250 of 1,200 | 2 steps/s | 8 min left"
    assert second == "step 1,000 of 1,200 | 2 steps/s | 2 min left | success 0.20"
    assert "\033" not in out + err


def test_tensorboard_gets_grouped_names(tmp_path, scripted, monkeypatch):
    written, opened = {}, []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.setdefault(name, {})[step] = value

        def flush(self):
            pass

    fake, folder = types.SimpleNamespace(SummaryWriter=SummaryWriter), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert main(LEARNING, "--total-steps 20 --run-dir", folder)[0] == 0
    assert main("--resume", folder, "--total-steps 30")[0] == 0
    assert opened == [(folder, 10), (folder, 30)]
    groups = {"train": "train", "low": "low", "high": "high", "chosen": "chosen"}
    for name in rows(folder)[0].keys() - {"step", "seed"}:
        found = written.pop(f"{groups.get(name.split('_')[0], 'evaluation')}/{name}")
        expected = {int(row["step"]): float(row[name]) for row in rows(folder)}
        assert_same(found, expected)
    assert not written, "neither step nor seed"


# ------------------------------------------------------------ flags, bad input, one's own task


def test_flags_come_from_the_dataclasses_and_are_forgiving():
    given = options.parse(
        "--total_steps 1e6 --no-correction --policy_noise=.5 --env=my_a:A".split()
    )
    assert given == dict(total_steps=10**6, correction=False, policy_noise=0.5, env="my_a:A")
    assert type(given["total_steps"]) is int
    given = options.parse("--run_dir my_run --seed 1_000 --discount 0.8".split())
    assert given == dict(run_dir="my_run", seed=1000, discount=0.8)


def test_help_names_every_setting_and_the_paper_s_value_where_ours_differs():
    code, out, _ = main("--help")
    entries = {entry.split()[0].strip(","): entry for entry in re.split(r"\n  (?=--)", out)}
    entries = {name: " ".join(entry.split()) for name, entry in entries.items()}
    assert code == 0
    for field in (*dataclasses.fields(options.RunConfig), *dataclasses.fields(HIROConfig)):
        entry = entries["--" + field.name.replace("_", "-")]
        assert " ".join(field.metadata["help"].split()) in entry
        assert field.default is None or f"(default: {field.default}" in entry
        paper = PRESETS["paper"].get(field.name, field.default)
        assert ("paper: " in entry) == (paper != field.default)
        assert paper == field.default or f"paper: {paper})" in entry
    assert "(default: 0.1; paper: 1.0)" in entries["--low-reward-scale"]


@pytest.fixture(scope="module")
def things(whole_run, tmp_path_factory):
    """A finished run and other files that bad inputs can point at."""
    bad = tmp_path_factory.mktemp("bad")
    shutil.copytree(whole_run, bad / "run")
    torch.save({"weights": torch.zeros(3)}, bad / "foreign.pt")
    (bad / "text.pt").write_text("not a policy")
    (bad / "broken").mkdir()
    (bad / "broken" / "config.json").write_text("{")
    return bad


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
POINT = "--env PointMaze "
ALL = "choose from AntMaze, AntPush, AntFall, AntGather, PointMaze"
BAD_INPUTS = {
    "": f"--env is missing; {ALL}",
    "--env": "expected one argument",
    "--env AntMoze": "did you mean AntMaze?",
    "--env CartPole": ALL,
    "--env :Class": ALL,
    "--env nowhere:Class": "No module named 'nowhere'",
    "--env math:Class": "has no attribute 'Class'",
    "--env math:pi": "is no gymnasium.Env",
    POINT + "--total-steps -5": "must be at least 1",
    POINT + "--total-steps 1.5": "not a whole number",
    POINT + "--total-steps many": "invalid whole number",
    POINT + "--total-steps inf": "not a whole number",
    POINT + "--seed -1": "--seed -1: must be between 0 and",
    POINT + "--seed 1e20": "must be between 0 and 9223372036854775807",
    POINT + "--threads 1e10": "between 1 and 1024",
    POINT + "--num-envs 9 --buffer-size 8": "--num-envs 9: must not exceed",
    POINT + "--num-envs 4 --start-steps 39": "must be at least 40",
    POINT + "--num-candidates 1": "must be at least 2",
    POINT + "--high-random-first 1.5": "must be between 0 and 1",
    POINT + "--discount 1.5": "--discount 1.5: must be between 0 and 0.9999",
    POINT + "--tau 0": "--tau 0.0: must be above 0, at most 1",
    POINT + "--tau nan": "must be above 0, at most 1",
    POINT + "--exploration-noise inf": "must be at least 0, and finite",
    POINT + "--policy-noise -0.1": "must be at least 0, and finite",
    POINT + "--actor-lr 0": "must be positive",
    POINT + "--units metres": "argument --units: invalid choice: 'metres'",
    POINT + "--preset td3": "argument --preset: invalid choice: 'td3'",
    POINT + "--device cuda": "use cpu",
    POINT + "--device tpu": "argument --device: invalid choice",
    POINT + "--bath-size=100": "unknown argument --bath-size=100; did you mean --batch-size?",
    POINT + "extra": "unknown argument extra; see --help",
    POINT + "--render": "--render goes with --eval-only POLICY",
    POINT + "--which best": "--which goes with --eval-only POLICY",
    POINT + "--plot a.png": "--plot goes with --eval-only POLICY",
    POINT + "--run-dir broken": "not empty; give another --run-dir, or --resume broken",
    POINT + "--run-dir text.pt/run": "Not a directory",
    POINT + "--run-dir x --buffer-size 1e13": "cannot set the run up: ",
    POINT + "--run-dir x --hidden 1e7": "cannot set the run up: ",
    "--resume nothing": "no run here",
    "--resume broken": "config.json is damaged",
    "--resume run --env AntMaze": "--env AntMaze differs from the run's Ball; only --total-steps",
    "--resume run --tau 0.1": "tau 0.1 differs",
    "--resume run --no-correction": "--correction False differs",
    "--resume run --preset paper": "--preset paper differs",
    "--resume run --total-steps 499": "the run is at 500 already",
    "--resume run --eval-every 0": "must be at least 1",
    "--eval-only nothing.pt": "no such policy",
    "--eval-only text.pt": "not a readable policy",
    "--eval-only foreign.pt": "not a policy of this version",
    "--eval-only run/policy.pt --env AntPush": "a policy for Ball, not AntPush",
    "--eval-only run/policy.pt --which worst": "argument --which: invalid choice",
    "--eval-only run/policy.pt --subgoal-steps 3": "--subgoal-steps does not go with --eval-only",
    "--eval-only run/policy.pt --resume run": "--resume does not go with --eval-only",
    "--eval-only run/policy.pt --plot nowhere/a.png": "no such folder",
    "--eval-only run/policy.pt --plot a.foo": ".png" if HAS_MATPLOTLIB else "matplotlib",
    "--eval-only run/policy.pt --video a.foo": "write a .gif or an .mp4",
    "--eval-only run/policy.pt --render": "needs a screen",
    "--eval-only run/policy.pt --render --video a.gif": "goes without --plot and --video",
}
for name in (  # what must be there at all
    *("total-steps", "eval-every", "eval-episodes", "checkpoint-every", "num-envs", "threads"),
    *("subgoal-steps", "batch-size", "hidden", "policy-delay", "high-update-every"),
    "buffer-size",
):
    BAD_INPUTS[f"{POINT}--{name} 0"] = f"--{name} 0: must be "


@pytest.mark.parametrize("line", BAD_INPUTS)
def test_bad_input_gets_one_line_and_status_2(line, things, monkeypatch):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(things)
    monkeypatch.setattr(train, "train", lambda agent, run: pytest.fail("nothing was found wrong"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    before = {path: path.stat().st_mtime_ns for path in things.rglob("*")}
    assert BAD_INPUTS[line] in one_line(line)
    assert {path: path.stat().st_mtime_ns for path in things.rglob("*")} == before, "untouched"


MINE = """
import gymnasium
import numpy as np

class Mine(gymnasium.Env):
    state_dim, action_dim, low_blind, privileged_dim, action_unit = 2, 1, 1, 0, 1.0
    max_subgoal, observation_scale = np.ones(1), np.ones(3)
    high_reward_scale, reward_lasts, score = 1.0, True, "return"
    total_steps, high_uniform_steps = 60, 0
    observation_space = gymnasium.spaces.Box(-99, 99, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, evaluate=False, render_mode=None):
        self.place = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(), 0
        return np.array([self.place, self.steps, 9], np.float32), {}

    def step(self, action):
        self.place, self.steps = self.place + float(action[0]), self.steps + 1
        obs, distance = np.array([self.place, self.steps, 9], np.float32), abs(9 - self.place)
        info = {"is_success": distance < 1, "distance": distance, "simulator_warnings": 0}
        return obs, -distance, False, self.steps == 13, info

    def get_state(self):
        return [self.place, self.steps, self.np_random.bit_generator.state]

    def set_state(self, state):
        self.place, self.steps, self.np_random.bit_generator.state = state
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Call with the source of mine.py: a module in the folder that the program is started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield lambda source: (tmp_path / "mine.py").write_text(source)
    sys.modules.pop("mine", None)


def test_a_task_of_one_s_own_is_trained_resumed_and_evaluated(mine, tmp_path):
    mine(MINE)
    line = SMALL.replace("Ball", "mine:Mine") + "--start-steps 20 --num-envs 2"
    assert main(line, "--run-dir whole")[0] == 0
    assert main(line, "--total-steps 34")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine.Mine_seed0_20")
    assert main("--resume", folder, "--total-steps 60")[0] == 0
    whole, parts = (checkpoint(each) for each in (tmp_path / "whole", folder))
    assert_same([whole["envs"], whole["agent"]], [parts["envs"], parts["agent"]])
    code, out, _ = main("--eval-only", folder / "policy.pt")
    assert code == 0 and "mine:Mine" in out and "success_rate" in out
    lacks = "mine:Mine lacks walls" if HAS_MATPLOTLIB else "matplotlib"
    for flag, said in (("--plot", lacks), ("--video", "no rgb_array")):
        assert said in one_line("--eval-only", folder / "policy.pt", flag, "a.gif")


@pytest.mark.parametrize(
    "there, instead, said",
    [
        ("total_steps, high_uniform_steps = 60, 0", "",
         "lacks total_steps, high_uniform_steps; envs.py says"),
        ('"return"', '"reward"', "has score reward, which is neither success_rate nor return"),
        ('"distance": distance, "simulator_warnings": 0', "", "distance, simulator_warnings out"),
        ("action_unit = 2, 1,", "action_unit = 2, 3,", "acts in (1,), action_dim says (3,)"),
        ("np.ones(3", "np.ones(4", "observes (3,), observation_scale and privileged_dim say (4,)"),
        ("Box(-99, 99, (3,)", "Box(-99, 99, (2,)", "observes (2,), observation_scale and"),
        ("Box(-1, 1", "Box(-2, 2", "has action_space Box(-2.0, 2.0, (1,), float32), not Box(-1.0"),
        ("observation_space =", "space =", "lacks observation_space"),
        ("action_space =", "space =", "lacks action_space"),
        ("[self.place, self.steps, self", "[np.ones(2), self", "a get_state() of more than"),
        ("def set_state", "def put_state", "lacks set_state; envs.py says"),
        (
            "low_blind, privileged_dim",
            "privileged_dim, low_blind",
            "must take evaluate, render_mode, privileged (",
        ),
        ("evaluate=False, ", "", "must take evaluate, render_mode ("),
        ("(gymnasium.Env)", "", "is no gymnasium.Env"),
    ],
)  # fmt: skip
def test_what_a_task_of_one_s_own_lacks_is_said_before_it_is_trained(
    there, instead, said, mine, tmp_path
):
    assert MINE.count(there) == 1
    mine(MINE.replace(there, instead))
    assert said in one_line("--env mine:Mine")
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------ the pieces


def test_each_leaf_can_be_copied_alone():
    needs = dict(td3="", buffers="", relabel="", envs="", hiro="td3 buffers relabel")
    code = f"""import importlib, sys
for name, needed in {needs}.items():
    sys.modules.update(dict.fromkeys([*{needs}, "train", "harness", "results"]))  # not to be found
    for wanted in (name, *needed.split()):
        del sys.modules[wanted]
    importlib.import_module(name)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ------------------------------------------------------------ pictures


def test_curves_are_drawn_from_csv_files_even_torn_ones(whole_run, tmp_path):
    pytest.importorskip("matplotlib")
    from results import plot

    for seed in range(2):
        shutil.copytree(whole_run, tmp_path / f"seed{seed}")
    edit(tmp_path / "seed1" / "config.json", lambda saved: saved["run"].update(seed=1))
    with open(tmp_path / "seed1" / "progress.csv", "a") as file:
        file.write("900,0,")  # a run still going may have written half a line
    assert [list(run["step"]) for run in plot.find([tmp_path])["Ball"]] == [[170, 340, 500]] * 2
    edit(tmp_path / "seed1" / "config.json", lambda saved: saved.update(preset="paper"))
    plot.main([str(tmp_path)])
    words = (tmp_path / "curves.svg").read_text()  # text is paths, with what it says in a comment
    for label in ("default", "paper"):
        assert f"<!-- {label}: 0 of 1 solved -->" in words
    edit(tmp_path / "seed1" / "config.json", lambda saved: saved.update(variant="cosine"))
    plot.main([str(tmp_path)])
    assert "<!-- cosine: 0 of 1 solved -->" in (tmp_path / "curves.svg").read_text()


def test_a_median_ends_where_most_seeds_have_ended():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from results import plot

    axis = figure.add_subplot()
    ends = {2: [0.3, 0.9], 3: [0.1, 1.0, 0.8], 4: [0.2, 0.4, 1.0, 0.0]}
    runs = [{"step": np.arange(1, n + 1), "return": np.array(row)} for n, row in ends.items()]
    plot.draw_seeds(axis, runs, "return", "C0", "default")
    *seeds, median = axis.lines
    assert [len(line.get_ydata()) for line in seeds] == list(ends)
    np.testing.assert_allclose(median.get_ydata(), [0.2, 0.9, 0.9])


def test_paths_are_drawn_of_the_episodes_that_were_counted(whole_run, tmp_path, monkeypatch):
    """Two rounds of two copies, of which three episodes count; the first copy's end early."""
    pytest.importorskip("matplotlib")
    from harness import look

    drawn, counted, copies = [], [], []
    draw, evaluate, reset = look.trajectories, train.evaluate, Ball.reset
    monkeypatch.setattr(look, "trajectories", lambda *a: drawn.append(a) or draw(*a))
    monkeypatch.setattr(train, "evaluate", lambda *a: counted.extend(evaluate(*a)) or counted)
    monkeypatch.setattr(runs, "EVAL_COPIES", 2)
    monkeypatch.setattr(Ball, "reset", lambda env, **kw: copies.append(env) or reset(env, **kw))
    monkeypatch.setattr(Ball, "max_steps", property(lambda env: 43 if env is copies[0] else 70))
    path = tmp_path / "paths.png"
    code, out, err = main("--eval-only", whole_run / "policy.pt --eval-episodes 3 --plot", path)
    assert code == 0 and str(path) in out and path.read_bytes()[:4] == b"\x89PNG", err
    ((_, env, episodes),) = drawn
    assert [len(episode["path"]) for episode in episodes] == [43, 70, 43]
    for episode, result in zip(episodes, counted, strict=True):
        assert len(episode["path"]) == result["steps"]
        assert len(episode["subgoals"]) == math.ceil(result["steps"] / 10)
        assert np.array_equal(episode["path"][::10], episode["origins"])
        distance = np.linalg.norm(episode["path"][-1] - env.target)  # before the last step
        assert math.isclose(distance, result["distance"], abs_tol=0.4)
    assert len({tuple(episode["path"][0]) for episode in episodes}) == 3


def test_a_film_shows_the_first_episode(whole_run, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Ball, "max_steps", 9)  # drawing without a GPU is slow
    line = f"--eval-only {whole_run}/policy.pt --video {tmp_path}/film.gif"
    code, out, err = main(line)
    if "cannot render here" in err:
        pytest.skip("no off-screen OpenGL on this machine")
    assert code == 0 and f"{tmp_path}/film.gif" in out and "1 episode" in out, err
    with Image.open(tmp_path / "film.gif") as film:
        assert (
            film.n_frames == 5 and film.info["duration"] == 100
        )  # every other step, twice as fast
        assert np.asarray(film.convert("L")).std() > 10
