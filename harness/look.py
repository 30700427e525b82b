"""What a saved policy looks like: paths seen from above, films, the window."""

import importlib.util
import pathlib
import sys
import time
import warnings

import numpy as np

import envs as tasks
from harness import runs
from harness.options import UserError, find_task, flag

GREEN, RED, BLUE = "#2a9d4a", "#c8452f", "#2f6db5"
SPEED = 2  # films and the window run this many times as fast as life
EVERY = 2  # environment steps between two frames of a film
MODES = {"video": "rgb_array", "render": "human"}  # what an environment must be able to do


class Viewer:
    """The environments that a policy is seen in, and the pictures that are made of it there.

    settings       RunConfig; its eval_episodes are played
    given          the flags as typed; plot, video and render count here
    subgoal_steps  c
    """

    def __init__(self, settings, given, subgoal_steps):
        figure, film, window = (given.get(name) for name in ("plot", "video", "render"))
        task = find_task(settings.env)
        check(settings.env, task, given)
        alone = film and not figure and "eval_episodes" not in given
        self.episodes = 1 if alone else settings.eval_episodes
        copies = 1 if window else min(self.episodes, runs.EVAL_COPIES)
        mode = next((MODES[name] for name in MODES if name in given), None)
        self.envs = runs.make_envs(task, copies, evaluate=True, render_mode=mode)
        self.film = Film(film, self.envs) if film else None
        self.figure = Figure(figure, self.envs, subgoal_steps) if figure else None
        window = Window(self.envs) if window else None
        self.watchers = [each for each in (self.film, self.figure, window) if each]
        self.plan = f"{self.episodes} episode{'s' * (self.episodes > 1)}"
        if window:
            self.plan += " in a window; Esc ends it"
        if film:
            self.plan += ", filmed" if alone else ", the first filmed"

    def watch(self, t, obs, subgoal):
        for watcher in self.watchers:
            watcher(t, obs, subgoal)

    def finish(self, results):
        """Write the pictures of the episodes with these results."""
        for picture in (self.figure, self.film):
            if picture:
                picture.write(results)
                print(picture.path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.envs.close()
        if isinstance(error, WindowClosed):
            print(error)
            return True
        if error and not isinstance(error, UserError) and is_graphics_error(error):
            sys.unraisablehook = lambda _: None  # gymnasium's half-made viewer would add its own
            hint = "it takes EGL, OSMesa or a screen; MUJOCO_GL=egl, osmesa or glfw chooses"
            raise UserError(f"cannot render here: {hint}") from None


def is_graphics_error(error):
    """Whether OpenGL, or its absence, is behind this."""
    words = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return any(word in words for word in ("opengl", "egl", "glfw", "osmesa", "glad", "gl/"))


def check(name, task, given):
    """Raise UserError for a picture that cannot be made, before an episode is played for it."""

    def require(fine, option, problem):
        if not fine:
            value = "" if given[option] is True else f" {given[option]}"
            raise UserError(f"{flag(option)}{value}: {problem}")

    for option in {"plot", "video"} & given.keys():
        folder = pathlib.Path(given[option]).absolute().parent
        require(folder.is_dir(), option, "there is no such folder")
    for option in MODES.keys() & given.keys():
        able = MODES[option] in task.metadata.get("render_modes", ())
        require(able, option, f"{name} has no {MODES[option]} among its render_modes")
    if "render" in given:
        import glfw

        fine = not {"plot", "video"} & given.keys()
        require(fine, "render", "goes without --plot and --video; leave it out for them")
        with warnings.catch_warnings(action="ignore"):  # the line below says it
            screen = glfw.init() and glfw.get_primary_monitor()
        require(screen, "render", "needs a screen, and there is none here; --video needs none")
    if "video" in given:
        suffix = pathlib.Path(given["video"]).suffix
        require(suffix in (".gif", ".mp4"), "video", "write a .gif or an .mp4")
        fine = suffix == ".gif" or importlib.util.find_spec("imageio_ffmpeg")
        require(fine, "video", "for .mp4, pip install imageio[ffmpeg]; .gif works as is")
    if "plot" in given:
        fine = importlib.util.find_spec("matplotlib")
        require(fine, "plot", "needs matplotlib: pip install matplotlib")
        from matplotlib.backend_bases import FigureCanvasBase

        known = sorted(f".{kind}" for kind in FigureCanvasBase.filetypes)
        fine = pathlib.Path(given["plot"]).suffix in known
        require(fine, "plot", f"write one of {', '.join(known)}")
        env = task(evaluate=True, render_mode=None)
        env.close()
        missing = [part for part in DRAWN if not hasattr(env, part)]
        require(not missing, "plot", f"{name} lacks {', '.join(missing)}; see --video")
        require(env.walls, "plot", f"draws mazes, and {name} has none; see --video")


# ---------------------------------------------------------------------- paths from above

DRAWN = ("walls", "chasm", "block_places", "target", "success_distance")  # of an environment


class Figure:
    """A watch() for train.evaluate: remembers every episode's path, subgoals and blocks."""

    def __init__(self, path, envs, subgoal_steps):
        self.path, self.envs, self.c = path, envs, subgoal_steps
        self.rounds = []  # of lists of (positions [N, 2], subgoals [N, 2], blocks [N, blocks, 2])

    def __call__(self, t, obs, subgoal):
        if t == 0:
            self.rounds.append([])
        blocks = np.array(self.envs.get_attr("block_places"))
        self.rounds[-1].append((obs[:, :2].copy(), subgoal[:, :2].copy(), blocks))

    def episodes(self, results):
        """What trajectories() draws, for the result dicts of train.evaluate."""
        n, episodes = self.envs.num_envs, []
        for k, result in enumerate(results):
            steps = self.rounds[k // n][: result["steps"]]
            path, subgoals, blocks = (np.array(part)[:, k % n] for part in zip(*steps, strict=True))
            episode = {"path": path, "blocks": blocks, "success": result["success_rate"]}
            episode |= {"origins": path[:: self.c], "subgoals": subgoals[:: self.c]}
            episodes.append(episode)
        return episodes

    def write(self, results):
        trajectories(self.path, self.envs.envs[0], self.episodes(results))


def trajectories(path, env, episodes, arrows=5):
    """The maze from above: paths coloured by success, and the subgoals they were set.

    env       an environment of the task (for walls, chasm, target)
    episodes  list of dicts: path [T, 2], success, origins [M, 2] and subgoals [M, 2] (where each
              was set, and the change it asked for, m), blocks [T, blocks, 2]
    arrows    episodes whose subgoals are drawn
    """
    from matplotlib import figure as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Rectangle

    figure = plt.Figure(figsize=(6.4, 6.4), layout="constrained")
    axis = figure.subplots()

    def square(centre, **style):
        corner = np.asarray(centre) - tasks.CELL / 2
        axis.add_patch(Rectangle(corner, tasks.CELL, tasks.CELL, **style))

    for wall in env.walls:
        square(wall, color="#b9bfca", lw=0)
    for hole in env.chasm:
        square(hole, color="#3b3f48", lw=0)
    for episode in episodes:
        for start, end in zip(episode["blocks"][0], episode["blocks"][-1], strict=True):
            square(start, fill=False, ec="#b5651d", lw=1.5, ls="--", zorder=2)
            square(end, color="#d98c4a", alpha=0.6 / len(episodes) ** 0.5, lw=0, zorder=1)
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
    axis.add_patch(Circle(env.target[:2], env.success_distance, fill=False, ls=":", zorder=6))
    axis.plot(0, 0, "s", color="black", ms=6, zorder=6)
    (left, bottom), (right, top) = np.min(env.walls, axis=0) - 4, np.max(env.walls, axis=0) + 4
    axis.set(xlim=(left, right), xlabel="x (m)", ylim=(bottom, top), ylabel="y (m)", aspect="equal")
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


# ---------------------------------------------------------------------- moving pictures


def mark_subgoal(env, obs, subgoal):
    """Show a ball where the subgoal lies, if this is an environment that can; obs [obs], [d]."""
    if isinstance(env, tasks.AntMaze):
        env.markers = [env.ball(obs[:2] + subgoal[:2], 0.45, (0.15, 0.35, 0.9, 0.75), "subgoal")]


def frames_per_second(env):
    """Of a film of every step at the speed of life."""
    return env.metadata.get("render_fps", 10)


class WindowClosed(Exception):
    """Someone closed the window of an environment, or pressed Esc in it."""


def end_with_window(viewer):
    """Raise WindowClosed out of render(): gymnasium destroys the window, and goes on using it."""
    import glfw

    def close(*_):
        raise WindowClosed("the window was closed")

    def press(window, key, *rest):
        if key == glfw.KEY_ESCAPE:
            close()
        viewer._key_callback(window, key, *rest)

    glfw.set_window_close_callback(viewer.window, close)
    glfw.set_key_callback(viewer.window, press)


class Window:
    """A watch() that marks the subgoal in an environment's own window, and keeps its pace."""

    def __init__(self, envs):
        self.env, self.due = envs.envs[0], 0.0

    def __call__(self, t, obs, subgoal):
        if t == 0 and isinstance(self.env, tasks.AntMaze):  # its reset has opened the window
            end_with_window(self.env.renderer._get_viewer("human"))
        mark_subgoal(self.env, obs[0], subgoal[0])
        time.sleep(max(0.0, self.due - time.monotonic()))
        self.due = time.monotonic() + 1 / (SPEED * frames_per_second(self.env))


class Film:
    """A watch() that films the first episode of the first environment."""

    def __init__(self, path, envs):
        self.path, self.env, self.frames = path, envs.envs[0], []
        self.episode = 0

    def __call__(self, t, obs, subgoal):
        self.episode += t == 0
        if self.episode == 1 and t % EVERY == 0:
            mark_subgoal(self.env, obs[0], subgoal[0])
            self.frames.append(self.captioned(self.env.render(), t))

    def captioned(self, pixels, t):
        """A frame [height, width, 3] with a legend of its markers and the time, as an image."""
        from PIL import Image, ImageDraw, ImageFont  # imageio, and so gymnasium, needs it

        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        size = max(10, image.height // 32)
        style = dict(anchor="lm", fill="white", stroke_fill="black", stroke_width=1)
        style["font"] = ImageFont.load_default(size)
        x, y = size, 1.2 * size
        able = isinstance(self.env, tasks.AntMaze)
        markers = self.env.task_markers() + self.env.markers if able else []
        for label, rgba in {each["label"]: each["rgba"] for each in markers}.items():
            colour = tuple(int(255 * part) for part in rgba[:3])
            draw.circle((x, y), 0.4 * size, fill=colour, outline="black")
            draw.text((x + 0.7 * size, y), label, **style)
            x += draw.textlength(label, font=style["font"]) + 2 * size
        seconds = t / frames_per_second(self.env)
        draw.text((image.width - 7 * size, y), f"{seconds:.1f} s,  x{SPEED}", **style)
        return image

    def write(self, results):
        """The frames of the first result's steps, at SPEED."""
        frames = self.frames[: -(-results[0]["steps"] // EVERY)]
        fps = SPEED * frames_per_second(self.env) / EVERY
        if self.path.endswith(".mp4"):
            import imageio

            return imageio.mimwrite(self.path, list(map(np.asarray, frames)), fps=fps)
        first = frames[0].quantize()  # one palette: what stands still costs nothing
        rest = [frame.quantize(palette=first, dither=0) for frame in frames[1:]]
        first.save(self.path, append_images=rest, save_all=True, duration=1000 / fps, loop=0)
