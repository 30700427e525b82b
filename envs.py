"""The paper's four tasks (appendix B), and two for balls: PointMaze, PointPush.

Importing this module registers them with gymnasium as hiro/AntMaze-v0 and so on. An observation
is one flat vector, [state, task features]; a subgoal is a change of the first entries of the state.
What HIRO must know of a task stands in its class attributes:

    state_dim          entries of the state at the front of the observation
    max_subgoal [d]    half-range of each subgoal dimension (m, m, m, quaternion, rad)
    action_dim         entries of an action
    low_blind          entries at the front of the state that the low level never sees (x and y)
    observation_scale  [obs] factor on each observation entry for the networks: metres, radians,
                       5 m/s or rad/s, time as it is (thousands of steps)
    privileged_dim     entries that privileged=True appends to an observation: what the state leaves
                       out and the high level's critic sees in training
    action_unit        what action 1.0 means: torque (ant) or m/s (point)
    high_reward_scale  factor that brings the high level's Q, the discounted return, to order one
    reward_lasts       whether a reward is 0 at most and would go on at every step if nothing moved,
                       as a distance
    score              what makes one policy better than another: success_rate or return
    total_steps        environment steps of one training run
    high_uniform_steps environment steps at its start with uniformly random subgoals, until the
                       low level goes where it is told
"""

import os
import sys

import gymnasium
import mujoco
import numpy as np

CELL = 8.0  # side of a maze cell, m
WALL = 4.0  # height of walls, platforms and blocks, m
BOX = mujoco.mjtGeom.mjGEOM_BOX
SLIDE = mujoco.mjtJoint.mjJNT_SLIDE
ANT_SCALE = [1.0] * 15 + [0.2] * 14 + [1.0]  # observation_scale of an ant's state
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION  # all that the next mj_step depends on


class AntMaze(gymnasium.Env):
    """An ant in a U-shaped corridor, rewarded with -‖position - target‖ (appendix B, Ant Maze).

    observation  [32]  qpos[:15], qvel[:14], 0.001 t, target x, y
    action       [8]   in [-1, 1]; 1.0 is a torque of 30
    evaluate           False: the target is uniform in [-4, 20]²; True: it is (0, 16)
    privileged         True: the observation ends with the block's displacement (m), if there is one
    info               is_success (distance < 5 m), distance (m), simulator_warnings (this step)

    Maze drawings: # wall, . free, R start, B block that slides in x and y, Z block that slides in
    y and falls in z, ~ chasm. Columns run along +x, rows along +y (pictures show +y upwards).
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}

    state_dim = 30
    max_subgoal = np.array([10, 10, 0.5, 1, 1, 1, 1] + [0.5, 0.3] * 4, np.float32)  # C.1
    action_dim = 8
    low_blind = 2
    observation_scale = np.append(ANT_SCALE, [1.0, 1.0]).astype(np.float32)
    privileged_dim = 0
    action_unit = 30.0
    high_reward_scale = 0.0003
    reward_lasts = True
    score = "success_rate"
    total_steps = 10_000_000
    high_uniform_steps = 300_000

    maze = """
        # # # # #
        # R . . #
        # # # . #
        # . . . #
        # # # # #"""
    target_low, target_high = (-4.0, -4.0), (20.0, 20.0)  # where training targets are drawn
    eval_target = (0.0, 16.0)
    success_distance = 5.0
    max_steps = 500
    frame_skip = 5

    def __init__(self, evaluate=False, render_mode=None, width=640, height=640, privileged=False):
        self.model = self._build().compile()
        self.data = mujoco.MjData(self.model)
        self.num_qpos = self.state_dim // 2  # the robot's own coordinates come first,
        self.num_qvel = self.state_dim - 1 - self.num_qpos  # blocks behind them
        self.evaluate, self.privileged = evaluate, privileged
        self.render_mode = render_mode
        self.width, self.height = width, height
        self.renderer = None
        self.markers = []  # keyword arguments of visual-only geoms for the next rendered frame
        self.steps = 0
        self.target = np.array(self.eval_target)
        size = len(self.observation_scale) + privileged * self.privileged_dim
        bound = np.full(size, np.finfo(np.float32).max, np.float32)
        self.observation_space = gymnasium.spaces.Box(-bound, bound, dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32)

    # ------------------------------------------------------------------ the world

    def _robot(self):
        """The rllab ant: gymnasium's, with rllab's time step, gears and torques."""
        assets = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")
        spec = mujoco.MjSpec.from_file(os.path.join(assets, "ant.xml"))
        spec.option.timestep = 0.02
        for actuator in spec.actuators:
            actuator.gear[0] = 1.0
            actuator.ctrlrange = [-self.action_unit, self.action_unit]
        return spec

    def _build(self):
        """Robot, walls, platforms and blocks as one MjSpec, from the drawing."""
        spec = self._robot()
        cells = {
            (column, row): cell
            for row, line in enumerate(self.maze.split("\n")[1:])
            for column, cell in enumerate(line.split())
        }
        start = next(place for place, cell in cells.items() if cell == "R")
        floor = WALL if "~" in cells.values() else 0.0  # a chasm needs something to be cut into
        spec.body("torso").pos[2] += floor

        self.walls, self.blocks, self.chasm = [], [], []  # centres [x, y], for drawings
        for (column, row), cell in cells.items():
            x, y = CELL * (column - start[0]), CELL * (row - start[1])
            if floor and cell != "~":
                add_box(spec.worldbody, (x, y, floor / 2), rgba=(0.75, 0.75, 0.7, 1))
            if cell == "~":
                self.chasm.append((x, y))
            elif cell == "#":
                self.walls.append((x, y))
                add_box(spec.worldbody, (x, y, floor + WALL / 2), rgba=(0.45, 0.5, 0.6, 1))
            elif cell in "BZ":
                self.blocks.append((x, y))
                block = spec.worldbody.add_body(name="block", pos=(x, y, floor + WALL / 2))
                self._add_block(block, cell)

        self._add_scenery(spec)
        # A simulation that blows up shall be seen, not put back to the start in mid-episode.
        spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        for geom in spec.geoms:
            # Since MuJoCo 3.5 the margins of two touching geoms add up: half of rllab's .01 each.
            geom.margin = 0.005
            # The original hardens every contact of a world in which something can be pushed.
            geom.solimp[:3] = (0.995, 0.995, 0.01) if self.blocks else (0.8, 0.8, 0.01)
        return spec

    def _add_scenery(self, spec):
        """What a task has beyond its drawing."""

    def _add_block(self, block, cell):
        free, limited = mujoco.mjtLimited.mjLIMITED_FALSE, mujoco.mjtLimited.mjLIMITED_TRUE
        joint = dict(type=SLIDE, armature=0, damping=0, margin=0.01)
        if cell == "B":
            block.add_joint(name="block_x", axis=(1, 0, 0), limited=free, **joint)
            block.add_joint(name="block_y", axis=(0, 1, 0), limited=free, **joint)
            half, mass = CELL / 2, 0.0002
        else:
            y, z = (-CELL, CELL), (-WALL, 0)
            block.add_joint(name="block_y", axis=(0, 1, 0), limited=limited, range=y, **joint)
            block.add_joint(name="block_z", axis=(0, 0, 1), limited=limited, range=z, **joint)
            half, mass = 0.99 * CELL / 2, 0.001
        add_box(block, (0, 0, 0), half=half, mass=mass, rgba=(0.8, 0.35, 0.25, 1))

    # ------------------------------------------------------------------ the episode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        n, m = self.num_qpos, self.num_qvel
        self.data.qpos[:n] += self.np_random.uniform(-0.1, 0.1, n)
        self.data.qvel[:m] = 0.1 * self.np_random.standard_normal(m)
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        self._reset_task()
        if self.render_mode == "human":
            self.render()
        return self._observation(), self._info()

    def step(self, action):
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(f"action has shape {action.shape}, not {self.action_space.shape}")
        self.data.warning.number[:] = 0
        self.data.ctrl[:] = self.action_unit * np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        self.steps += 1
        reward, terminated = self._task_step()
        if self.render_mode == "human":
            self.render()
        truncated = self.steps >= self.max_steps
        return self._observation(), reward, terminated, truncated, self._info()

    def _state(self):
        qpos, qvel = self.data.qpos[: self.num_qpos], self.data.qvel[: self.num_qvel]
        return np.concatenate([qpos, qvel, [0.001 * self.steps]])

    def _distance(self):
        return float(np.linalg.norm(self.data.qpos[: len(self.target)] - self.target))

    def _info(self):
        distance = self._distance()
        success = distance < self.success_distance
        warnings = int(self.data.warning.number.sum())
        return {"is_success": success, "distance": distance, "simulator_warnings": warnings}

    # ------------------------------------------------------------------ the task

    def _reset_task(self):
        if self.evaluate or self.target_low is None:
            self.target = np.array(self.eval_target)
        else:
            self.target = self.np_random.uniform(self.target_low, self.target_high)

    def _task_step(self):
        return -self._distance(), False  # Maze, Push and Fall never terminate

    def _observation(self):
        privileged = self.data.qpos[self.num_qpos :] if self.privileged else []
        return np.concatenate([self._state(), self.target, privileged]).astype(np.float32)

    @property
    def block_places(self):
        """Where the blocks are now, [blocks, 2], m."""
        places = [self.data.body("block").xpos[:2].copy()] if self.blocks else []
        return np.array(places).reshape(-1, 2)

    # ------------------------------------------------------------------ save, restore, look

    def get_state(self):
        """Everything the future depends on, as plain Python numbers, lists and dicts."""
        physics = np.empty(mujoco.mj_stateSize(self.model, PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, PHYSICS)
        return {
            "physics": physics.tolist(),
            "steps": self.steps,
            "target": self.target.tolist(),
            "random": self.np_random.bit_generator.state,
        }

    def set_state(self, state):
        """Continue exactly where get_state() was called."""
        physics = np.array(state["physics"])
        if len(physics) != mujoco.mj_stateSize(self.model, PHYSICS):
            raise ValueError("this state was saved from another task")
        mujoco.mj_setState(self.model, self.data, physics, PHYSICS)
        mujoco.mj_forward(self.model, self.data)  # positions for rendering; changes the warm start,
        mujoco.mj_setState(self.model, self.data, physics, PHYSICS)  # hence once more
        self.steps = state["steps"]
        self.target = np.array(state["target"])
        self.np_random.bit_generator.state = state["random"]

    def render(self):
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs an environment made with a render_mode.")
            return None
        if self.renderer is None:
            self.renderer = self._make_renderer()
        viewer = self.renderer._get_viewer(self.render_mode)
        viewer.make_context_current()  # another environment may have drawn since
        for marker in self.task_markers() + self.markers:
            viewer.add_marker(**marker)
        return self.renderer.render(self.render_mode)

    def _make_renderer(self):
        """gymnasium's, which sees the whole maze: +x is to the right, +y upwards."""
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # off-screen, on a machine with no screen
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        self._paint()
        self.model.vis.global_.offwidth, self.model.vis.global_.offheight = self.width, self.height
        edges = self.walls or [(-13, -13), (13, 13)]
        low, high = np.min(edges, axis=0), np.max(edges, axis=0)
        distance = 1.3 * (high - low).max() * max(1, self.height / self.width)
        centre = np.array([*(low + high) / 2, 0.0])
        camera = {"lookat": centre, "distance": distance, "elevation": -75, "azimuth": 90}
        return MujocoRenderer(self.model, self.data, camera, self.width, self.height)

    def _paint(self):
        """Light and colours in which robot, floor, walls, blocks and markers can be told apart."""
        model, light = self.model, np.array([0.3, -0.3, -0.9])
        model.vis.headlight.ambient, model.vis.headlight.diffuse = 0.35, 0.25
        model.vis.headlight.specular = 0
        model.light_type, model.light_dir = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, light
        model.light_diffuse, model.light_specular, model.light_castshadow = 0.45, 0, False
        floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        model.geom_matid[floor] = -1  # without the asset's chequers
        model.geom_rgba[floor] = (0.23, 0.25, 0.28, 1) if self.chasm else (0.93, 0.93, 0.9, 1)
        robot = model.body_rootid[model.geom_bodyid] == model.body("torso").id
        model.geom_rgba[robot] = (0.9, 0.5, 0.1, 1)

    def task_markers(self):
        """Keyword arguments of visual-only geoms that show what the task is about."""
        return [self.ball(self.target[:2], 0.7, (0.2, 0.75, 0.3, 0.7), "target")]

    def ball(self, place, radius, rgba, label):
        """A marker for the next rendered frame, on top of a wall or block where one stands.

        place   x, y, m
        label   what a film's legend calls it
        """
        solid = [*self.walls, *self.block_places]
        inside = any(np.abs(np.subtract(place, centre)).max() < CELL / 2 for centre in solid)
        z = WALL * (inside + bool(self.chasm)) + radius
        return {
            "type": mujoco.mjtGeom.mjGEOM_SPHERE,
            "pos": np.array([*place, z], np.float64),
            "size": np.full(3, radius),
            "rgba": np.array(rgba),
            "label": label,
        }

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


class AntPush(AntMaze):
    """The way to the target is behind a block that must be pushed aside, not ahead.

    observation  [32]  as AntMaze; the target is (0, 19) always, the block is not observed
    """

    maze = """
        # # # # #
        # . R # #
        # . B . #
        # # . # #
        # # # # #"""
    target_low = None
    eval_target = (0.0, 19.0)
    privileged_dim = 2  # along x and y


class AntFall(AntMaze):
    """The way to the target is across a chasm, over a block that must be pushed into it.

    observation  [33]  as AntMaze, with a target in three dimensions, (0, 27, 4.5) always
    """

    observation_scale = np.append(ANT_SCALE, np.ones(3)).astype(np.float32)
    # Differs 11: the block at x = +8, where the maze needs it; the paper's text has -8
    maze = """
        # # # #
        # R . #
        # . Z #
        # ~ ~ #
        # . . #
        # # # #"""
    target_low = None
    eval_target = (0.0, 27.0, 4.5)
    privileged_dim = 2  # along y and z


class AntGather(AntMaze):
    """Collect 8 apples (+1), avoid 8 bombs (-1), seen through 10 + 10 range readings.

    observation  [50]  the state, then 10 apple and 10 bomb readings
    terminated         the torso's height leaves [.2, 1] m, or nothing is left to collect
    info               distance is to the nearest apple (m), is_success says that none is left
    """

    observation_scale = np.append(ANT_SCALE, np.ones(20)).astype(np.float32)
    high_reward_scale = 0.3
    score = "return"
    maze = "\nR"
    num_each = 8
    reward_lasts = False
    # Differs 10: the paper gives neither the readings nor the cost of dying
    bins, sensor_range = 10, 6.0

    def _add_scenery(self, spec):
        for x, y in ((-11, 0), (11, 0), (0, -11), (0, 11)):
            size = (0.5, 11.5, 1) if x else (11.5, 0.5, 1)
            box = dict(type=BOX, size=size, contype=1, conaffinity=1, rgba=(0.45, 0.5, 0.6, 1))
            spec.worldbody.add_geom(pos=(x, y, 1), **box)

    def _reset_task(self):
        places = [(x, y) for x in range(-10, 10, 2) for y in range(-10, 10, 2) if (x, y) != (0, 0)]
        chosen = self.np_random.choice(len(places), 2 * self.num_each, replace=False)
        self.objects = np.array(places, np.float64)[chosen]  # [16, 2], m
        self.values = np.repeat([1.0, -1.0], self.num_each)  # apples, then bombs

    def _task_step(self):
        near = np.linalg.norm(self.objects - self.data.qpos[:2], axis=1) < 1
        reward = float(self.values[near].sum())
        self.objects, self.values = self.objects[~near], self.values[~near]
        return reward, not 0.2 <= self.data.qpos[2] <= 1 or len(self.objects) == 0

    def _distance(self):
        apples = self.objects[self.values > 0] - self.data.qpos[:2]
        return float(np.linalg.norm(apples, axis=1).min()) if len(apples) else 0.0

    def _info(self):
        return {**super()._info(), "is_success": not (self.values > 0).any()}

    def _observation(self):
        w, x, y, z = self.data.qpos[3:7]
        heading = np.arctan2(2 * (x * y + w * z), w * w + x * x - y * y - z * z)
        offset = self.objects - self.data.qpos[:2]
        distance = np.linalg.norm(offset, axis=1)
        bearing = np.arctan2(offset[:, 1], offset[:, 0]) - heading
        sector = ((bearing + np.pi) % (2 * np.pi) / (2 * np.pi / self.bins)).astype(int)
        readings = np.zeros((2, self.bins))
        for i in np.argsort(-distance):  # far to near, so that the nearest is what remains
            if distance[i] <= self.sensor_range:
                kind = 0 if self.values[i] > 0 else 1
                readings[kind, min(sector[i], self.bins - 1)] = 1 - distance[i] / self.sensor_range
        return np.concatenate([self._state(), readings.ravel()]).astype(np.float32)

    def task_markers(self):
        kinds = {1: ((0.2, 0.75, 0.3, 1), "apple"), -1: ((0.8, 0.15, 0.2, 1), "bomb")}
        pairs = zip(self.objects, self.values, strict=True)
        return [self.ball(place, 0.5, *kinds[value]) for place, value in pairs]

    def get_state(self):
        objects = {"objects": self.objects.tolist(), "values": self.values.tolist()}
        return {**super().get_state(), **objects}

    def set_state(self, state):
        super().set_state(state)
        self.objects = np.array(state["objects"]).reshape(-1, 2)
        self.values = np.array(state["values"])


class PointMaze(AntMaze):
    """A ball in AntMaze's corridor, driven by velocity commands: cheap enough for tests.

    observation  [7]  x, y, dx, dy, 0.001 t, target x, y
    action       [2]  velocity command in [-1, 1]; 1.0 is 4 m/s
    Episodes last 300 steps of 0.1 s; the shortest way to (0, 16) takes about 85.
    """

    state_dim = 5
    action_dim = 2
    max_subgoal = np.array([5, 5], np.float32)
    observation_scale = np.array([1, 1, 0.2, 0.2, 1, 1, 1], np.float32)
    action_unit = 4.0
    total_steps = 150_000
    high_uniform_steps = 20_000
    max_steps = 300
    radius, force = 0.4, 80.0  # m; N at the most, what full speed asks for from rest

    def _robot(self):
        spec = mujoco.MjSpec()
        spec.option.timestep = 0.02
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_RK4
        spec.worldbody.add_light(pos=(0, 0, 30))
        plane = mujoco.mjtGeom.mjGEOM_PLANE
        spec.worldbody.add_geom(type=plane, size=(40, 40, 40), rgba=(0.8, 0.9, 0.8, 1))
        torso = spec.worldbody.add_body(name="torso", pos=(0, 0, self.radius + 0.1))
        ball = dict(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=(self.radius, 0, 0), mass=1.0)
        torso.add_geom(**ball, condim=1, conaffinity=0, rgba=(0.2, 0.4, 0.8, 1))
        for name, axis in (("x", (1, 0, 0)), ("y", (0, 1, 0))):
            torso.add_joint(name=name, type=SLIDE, axis=axis)
            joint = mujoco.mjtTrn.mjTRN_JOINT
            motor = spec.add_actuator(name=name, target=name, trntype=joint)
            motor.set_to_velocity(kv=20.0)
            motor.forcerange = (-self.force, self.force)
        return spec


class PointPush(PointMaze):
    """A ball about as wide, fast and strong as the ant, in AntPush's maze.

    observation  [7]  as PointMaze; the target is (0, 19) always, the block is not observed
    action       [2]  velocity command in [-1, 1]; 1.0 is 2 m/s
    Straight ahead the block ends up in the only gap; round it the way takes about 200 steps.
    """

    action_unit = 2.0
    privileged_dim = AntPush.privileged_dim
    radius, force = 0.7, 6.0
    maze = AntPush.maze
    target_low = None
    eval_target = AntPush.eval_target


def add_box(body, pos, half=CELL / 2, **geom):
    """A box of footprint 2 half x 2 half and the walls' height that ants and blocks run into."""
    return body.add_geom(
        type=BOX, pos=pos, size=(half, half, WALL / 2), contype=1, conaffinity=1, **geom
    )


TASKS = {
    task.__name__: task for task in (AntMaze, AntPush, AntFall, AntGather, PointMaze, PointPush)
}

for _name, _task in TASKS.items():
    # No max_episode_steps: the task counts its own steps, so that its state is all in one place.
    gymnasium.register(f"hiro/{_name}-v0", entry_point=_task)
