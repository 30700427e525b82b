"""Figures: learning curves from progress.csv files, and paths through a maze seen from above.

python results/plot.py            curves of all committed runs -> results/curves.png, curves.svg
python results/plot.py RUN ...    curves of these runs, one still going included -> RUN/curves.*
"""

import csv
import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PAPER = {"AntMaze": 0.99, "AntPush": 0.92, "AntFall": 0.66, "AntGather": 3.02}  # Table 1
GREEN, RED, BLUE, GREY = "#2a9d4a", "#c8452f", "#2f6db5", "#8a93a3"
PRESETS = {"td3": BLUE, "paper": RED}


def pyplot():
    """matplotlib, or one line that says what to install."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot: this needs matplotlib; pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hiro"
    import matplotlib.pyplot

    return matplotlib.pyplot


def read(path):
    """progress.csv -> dict of arrays; the last line of a run still going may be incomplete."""
    lines = pathlib.Path(path).read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def find(folders, without=None):
    """Every CSV below the folders that has its run's JSON beside it: {"AntMaze": [curve, ...]}.

    without  the name of a folder to leave out
    returns  curves as read() gives them, with the run's "preset" and "commits"
    """
    groups = {}
    for folder in folders:
        paths = sorted(pathlib.Path(folder).rglob("*.csv"))
        for path in paths:
            beside = [path.with_name("config.json"), path.with_suffix(".json")]
            config = next((file for file in beside if file.exists()), None)
            curve = read(path) if config else {}
            if curve and path.parent.name != without:
                saved = json.loads(config.read_text())
                sittings = [saved["versions"], *saved.get("resumed", [])]
                curve["preset"] = saved["preset"]
                curve["commits"] = {sitting["commit"][:7] for sitting in sittings}
                groups.setdefault(saved["run"]["env"], []).append(curve)
    return groups


def curves(groups, stem):
    """One panel per task: every seed thin, each preset's median thick, the paper's value dashed."""
    plt = pyplot()
    tasks = [task for task in (*PAPER, "PointMaze") if task in groups]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(1 + 3.4 * len(tasks), 3.2), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        name = "return" if task == "AntGather" else "success_rate"
        notes = {}
        for preset, colour in PRESETS.items():
            runs = [run for run in groups[task] if run["preset"] == preset]
            if runs:
                notes[preset] = draw_seeds(axis, runs, name, colour)
        if task in PAPER:
            axis.axhline(PAPER[task], color=GREY, ls="--", lw=1.2)
            place = dict(transform=axis.get_yaxis_transform(), va="top", fontsize=8, color=GREY)
            label = f"paper's best {PAPER[task]}"  # Table 1: the best policy within 10M steps
            axis.text(0.01, PAPER[task] - 0.015, label, **place)
        if name == "success_rate":
            axis.set_ylim(-0.03, 1.03)
        commits = ", ".join(sorted(set.union(*(run["commits"] for run in groups[task]))))
        place = dict(transform=axis.transAxes, ha="right", fontsize=7, color=GREY)
        axis.text(1, 1.14, f"commit {commits}", **place)
        axis.set_title(f"{task}\n", loc="left", fontsize=11, fontweight="bold")
        if "td3" in notes:
            axis.text(0, 1.03, notes["td3"], transform=axis.transAxes, fontsize=9, color="#444444")
        if "paper" in notes:
            place = dict(transform=axis.transAxes, ha="right", fontsize=8, color=PRESETS["paper"])
            behind = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1)
            axis.text(0.99, 0.06, f"preset paper: {notes['paper']}", bbox=behind, **place)
        axis.set_xlabel("million environment steps")
        axis.set_ylabel(name.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    for suffix in (".png", ".svg"):
        undated = {"Date": None} if suffix == ".svg" else None  # the same data, the same file
        figure.savefig(f"{stem}{suffix}", dpi=150, metadata=undated)
    plt.close(figure)


def draw_seeds(axis, runs, name, colour):
    """Draw column `name` of the runs of one preset; returns how they end, in words."""
    for run in runs:
        axis.plot(run["step"] / 1e6, run[name], color=colour, lw=0.9, alpha=0.6)
    # the median at a step is over the seeds that got that far
    steps = np.unique(np.concatenate([run["step"] for run in runs]))
    median = [
        np.median([r[name][r["step"] == s][0] for r in runs if s in r["step"]]) for s in steps
    ]
    axis.plot(steps / 1e6, median, color=colour, lw=2.4)
    if name == "return":
        return f"{len(runs)} seeds"
    solved = sum(run[name][-1] >= 0.9 for run in runs)
    return f"{solved} of {len(runs)} seeds ≥ .9 at the end"


class Trace:
    """A watch() for train.play: remembers every episode's path, subgoals and blocks."""

    def __init__(self, envs, subgoal_steps):
        self.envs, self.c = envs, subgoal_steps
        self.rounds = []  # of lists of (positions [N, 2], subgoals [N, 2], blocks [N, blocks, 2])

    def __call__(self, t, obs, subgoal):
        if t == 0:
            self.rounds.append([])
        blocks = np.array(self.envs.get_attr("block_places"))
        self.rounds[-1].append((obs[:, :2].copy(), subgoal[:, :2].copy(), blocks))

    def episodes(self, results):
        """What trajectories() draws, for the result dicts of train.rollouts."""
        n, episodes = self.envs.num_envs, []
        for k, result in enumerate(results):
            steps = self.rounds[k // n][: result["steps"]]
            path, subgoals, blocks = (np.array(part)[:, k % n] for part in zip(*steps, strict=True))
            episode = {"path": path, "blocks": blocks, "success": result["success_rate"]}
            episode |= {"origins": path[:: self.c], "subgoals": subgoals[:: self.c]}
            episodes.append(episode)
        return episodes


def trajectories(path, env, episodes, arrows=5):
    """The maze from above: ants' paths coloured by success, and the subgoals they were set.

    env       an environment of the task (for walls, chasm, target)
    episodes  list of dicts: path [T, 2], success, origins [M, 2] and subgoals [M, 2] (where each
              was set, and the change it asked for, m), blocks [T, blocks, 2]
    arrows    episodes whose subgoals are drawn
    """
    plt = pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    figure, axis = plt.subplots(figsize=(6.4, 6.4), layout="constrained")

    def square(centre, half, **style):
        corner = np.asarray(centre) - half
        axis.add_patch(Rectangle(corner, 2 * half, 2 * half, **style))

    for wall in env.walls:
        square(wall, 4, color="#b9bfca", lw=0)
    for hole in env.chasm:
        square(hole, 4, color="#3b3f48", lw=0)
    for episode in episodes:
        for start, end in zip(episode["blocks"][0], episode["blocks"][-1], strict=True):
            square(start, 4, fill=False, ec="#b5651d", lw=1.5, ls="--", zorder=2)
            square(end, 4, color="#d98c4a", alpha=0.6 / len(episodes) ** 0.5, lw=0, zorder=1)
        colour = GREEN if episode["success"] else RED
        axis.plot(*episode["path"].T, color=colour, lw=1, alpha=0.6, zorder=3)
        axis.plot(*episode["path"][-1], "o", color=colour, ms=4, zorder=4)
    for episode in episodes[:arrows]:
        axis.quiver(
            *episode["origins"].T,
            *episode["subgoals"].T,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.0025,
            color=BLUE,
            alpha=0.55,
            zorder=5,
        )
    axis.plot(*env.target[:2], "*", color="gold", mec="black", ms=18, zorder=6)
    axis.add_patch(plt.Circle(env.target[:2], env.success_distance, fill=False, ls=":", zorder=6))
    axis.plot(0, 0, "s", color="black", ms=6, zorder=6)
    edges = np.array(env.walls) if env.walls else np.array([[-8, -8], [8, 8]])
    axis.set(xlim=(edges[:, 0].min() - 4, edges[:, 0].max() + 4), xlabel="x (m)", ylabel="y (m)")
    axis.set(ylim=(edges[:, 1].max() + 4, edges[:, 1].min() - 4), aspect="equal")
    solved = sum(bool(episode["success"]) for episode in episodes)
    axis.set_title(f"{type(env).__name__}: {solved} of {len(episodes)} episodes end at the target")
    handles = [
        Line2D([], [], color=GREEN, marker="o", ms=4, label="reached"),
        Line2D([], [], color=RED, marker="o", ms=4, label="missed"),
        Line2D([], [], color=BLUE, marker=">", ms=4, label="subgoal, where it was set"),
        Line2D([], [], color="gold", marker="*", mec="black", ms=12, ls="", label="target"),
        Line2D([], [], color="black", marker="s", ms=5, ls="", label="start"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(folders):
    groups = find(folders) if folders else find([HERE], without="history")  # earlier settings
    if not groups:
        sys.exit(f"plot: no progress.csv with an evaluation below {', '.join(folders) or HERE}")
    stem = pathlib.Path(folders[0] if folders else HERE) / "curves"
    curves(groups, stem)
    print(f"{stem}.png and {stem}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
