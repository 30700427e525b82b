"""Learning curves from progress.csv files.

python results/plot.py            curves of the runs in results/<task>/ -> results/curves.svg,
                                  and of those in results/variants/ -> results/variants.svg
python results/plot.py RUN ...    curves of these runs, one still going included -> RUN/curves.svg
"""

import csv
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from harness.options import UserError, one_line_errors, paths

HERE = pathlib.Path(__file__).resolve().parent
PAPER = {"AntMaze": 0.99, "AntPush": 0.92, "AntFall": 0.66, "AntGather": 3.02}  # Table 1
TASKS = (*PAPER, "PointMaze", "PointPush")  # the order of the panels; any others come after
GREY = "#8a93a3"
COLOURS = {"default": "#2f6db5", "paper": "#c8452f"}  # of presets; variants get others


def read(path):
    """progress.csv -> dict of arrays; the last line of a run still going may be incomplete."""
    lines = pathlib.Path(path).read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def find(folders):
    """Every CSV below the folders that has its run's JSON beside it: {"AntMaze": [curve, ...]}.

    returns  curves as read() gives them, with the run's "label" (its variant or preset) and
             "commits"; of several runs of a seed the longest, and the last by name of equally
             long ones
    """
    seeds = {}  # {(task, label, seed): [curve, ...]}
    for folder in folders:
        for path in sorted(pathlib.Path(folder).rglob("*.csv")):
            beside = [path.with_name("config.json"), path.with_suffix(".json")]
            config = next((file for file in beside if file.exists()), None)
            curve = read(path) if config else {}
            if curve:
                saved = json.loads(config.read_text())
                sittings = [saved["versions"], *saved.get("resumed", [])]
                preset = {"td3": "earlier default"}.get(saved["preset"], saved["preset"])
                curve |= {"label": saved.get("variant") or preset, "path": path}
                curve["commits"] = {sitting["commit"][:7] for sitting in sittings}
                run = saved["run"]
                seeds.setdefault((run["env"], curve["label"], run["seed"]), []).append(curve)
    groups = {}
    for (task, _, seed), runs in seeds.items():
        *reruns, longest = sorted(runs, key=lambda run: run["step"][-1])
        groups.setdefault(task, []).append(longest)
        for run in reruns:
            print(f"{run['path']}: left out, as {longest['path']} is seed {seed} too")
    return groups


def curves(groups, path):
    """One panel per task: seeds thin, medians of presets and variants thick, the paper's dashed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("this needs matplotlib; pip install matplotlib") from None
    matplotlib.rcParams["svg.hashsalt"] = "hiro"
    tasks = [task for task in TASKS if task in groups] + sorted(groups.keys() - set(TASKS))
    others = sorted({run["label"] for runs in groups.values() for run in runs} - COLOURS.keys())
    colours = COLOURS | {label: f"C{i}" for i, label in enumerate(others, 1)}
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure = matplotlib.figure.Figure((4.2 * columns, 2.8 * rows), layout="constrained")
    for number, task in enumerate(tasks, 1):
        axis = figure.add_subplot(rows, columns, number)
        name = "return" if task == "AntGather" else "success_rate"
        for label, colour in colours.items():
            runs = [run for run in groups[task] if run["label"] == label]
            if runs:
                draw_seeds(axis, runs, name, colour, label)
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1.03))
        if task in PAPER:
            axis.axhline(PAPER[task], color=GREY, ls="--", lw=1.2)
            place = dict(transform=axis.get_yaxis_transform(), va="top", fontsize=8, color=GREY)
            label = f"paper's best {PAPER[task]}"  # Table 1: the best policy within 10M steps
            axis.text(0.01, PAPER[task] - 0.015, label, **place)
        if name == "success_rate":
            axis.set_ylim(-0.03, 1.03)
        commits = sorted(set.union(*(run["commits"] for run in groups[task])))
        place = dict(transform=axis.transAxes, va="bottom", fontsize=7, color=GREY)
        axis.text(1.03, 0, "\n".join(["commits", *commits]), **place)
        axis.set_title(task, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("million environment steps")
        axis.set_ylabel(name.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})  # the same data, the same file


def draw_seeds(axis, runs, name, colour, label):
    """Draw column `name` of the runs with this label, which the legend gets with how they fare."""

    def draw(steps, values, **style):
        marker = "o" if len(steps) == 1 else None  # one point makes no line
        axis.plot(steps / 1e6, values, color=colour, marker=marker, ms=4, **style)

    for run in runs:
        draw(run["step"], run[name], lw=0.9, alpha=0.6)
    # the median at a step is over the seeds that got that far, which must be most: a run may be
    # stopped once it is solved, and those that are left are not like the others
    steps, seeds = np.unique(np.concatenate([run["step"] for run in runs]), return_counts=True)
    steps = steps[seeds > len(runs) / 2]
    median = [
        np.median([r[name][r["step"] == s][0] for r in runs if s in r["step"]]) for s in steps
    ]
    fares = f"{len(runs)} seed" + "s" * (len(runs) > 1)
    if name == "success_rate":
        fares = f"{sum(solved(run[name]) for run in runs)} of {len(runs)} solved"
    draw(steps, median, lw=2.4, label=f"{label}: {fares}")


def solved(success_rate):
    """Whether three evaluations in a row are .9 or better."""
    good = success_rate >= 0.9
    return bool((good[:-2] & good[1:-1] & good[2:]).any())


def main(argv):
    if folders := paths(argv, __doc__, "RUN", nargs="*"):
        figures = {pathlib.Path(folders[0]) / "curves.svg": folders}
    else:
        figures = {HERE / "curves.svg": [HERE / task for task in TASKS]}
        figures[HERE / "variants.svg"] = [HERE / "variants"]
    found = {path: groups for path, sources in figures.items() if (groups := find(sources))}
    if not found:
        raise UserError(f"no progress.csv with an evaluation below {', '.join(folders) or HERE}")
    for path, groups in found.items():
        curves(groups, path)
        print(path)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
