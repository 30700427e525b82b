"""HIRO: hierarchical reinforcement learning with off-policy correction (Nachum et al. 2018).

The high level says every c steps by how much the state should change (the subgoal); the low level
is rewarded for getting there. Both learn with TD3, from replay buffers of their own.
"""

from dataclasses import dataclass, field, replace

import torch

from buffers import ReplayBuffer
from relabel import relabel
from td3 import TD3


def goal_transition(state, subgoal, next_state):
    """h(s, g, s') = s + g - s': the same place to reach, seen from s' (eq. 2, section 3.2).

    state, next_state  [..., >= d]  raw states; the first d entries are used (m, m, m, quat, rad)
    subgoal            [..., d]     desired change of state, same units
    returns            [..., d]
    """
    d = subgoal.shape[-1]
    return state[..., :d] + subgoal - next_state[..., :d]


def intrinsic_reward(state, subgoal, next_state):
    """Low-level reward r = -‖s + g - s'‖_2 (eq. 3, section 3.2).

    state, next_state  [..., >= d]  raw states; the first d entries are used (m, m, m, quat, rad)
    subgoal            [..., d]     desired change of state, same units
    returns            [...]        <= 0, unscaled
    """
    return -((goal_transition(state, subgoal, next_state) ** 2).sum(-1) ** 0.5)


def option(default, meaning):
    """A hyperparameter and its line of --help."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class HIROConfig:
    """Hyperparameters of the agent. Defaults are --preset td3; PRESETS["paper"] is appendix C.

    A noise scale is a fraction of the half-range where units is "range", and in torque, metres
    and radians (m/s for the point) where units is "raw".
    """

    units: str = option("range", "what networks see and noise is measured in: range or raw")
    subgoal_steps: int = option(10, "c: steps between two subgoals (3.1)")
    # Differs 5 and 8: shorter horizons, faster targets for the high level
    low_discount: float = option(0.98, "gamma, per step (C.2: .99)")
    high_discount: float = option(0.98, "gamma, per c steps (C.2: .99)")
    low_tau: float = option(0.005, "tau: how far targets move at a delayed update (C.2)")
    high_tau: float = option(0.05, "tau: how far targets move at a delayed update (C.2: .005)")
    batch_size: int = option(100, "transitions per gradient step, both levels")
    hidden: int = option(300, "units in each of the two hidden layers (C.1)")
    # Differs 2: all noise in fractions of the range
    low_noise: float = option(0.2, "sigma: exploration of the low level (C.2)")
    high_noise: float = option(0.2, "sigma: exploration of the high level (C.2)")
    policy_noise: float = option(0.2, "std of the target policy smoothing, both levels")
    noise_clip: float = option(0.5, "clip of the target policy smoothing, both levels")
    policy_delay: int = option(2, "critic updates per update of actor and targets")
    # Differs 4 and 8: step sizes
    low_actor_lr: float = option(3e-4, "Adam step size (C.2)")
    low_critic_lr: float = option(3e-4, "Adam step size (C.2)")
    high_actor_lr: float = option(1e-3, "Adam step size (C.2)")
    high_critic_lr: float = option(3e-3, "Adam step size (C.2)")
    # Differs 7: errors of Q within the quadratic part of the Huber loss
    low_reward_scale: float = option(0.1, "factor on the intrinsic reward (C.2: 1)")
    high_reward_scale: float = option(0.01, "factor on the environment's reward (C.2: .1)")
    # Differs 6: half of the past seen with other subgoals
    low_relabel: float = option(0.5, "share of low-level samples with another one's subgoal (5.2)")
    # Differs 10: in the end a low level that walks, and does not forget how
    rest_step: int = option(
        None, "environment step up to which the low level learns; 0: no end (default: the task's)"
    )
    rest_reach: float = option(
        0.4, "from then on: how far subgoals reach along x and y, as a share of their range"
    )
    low_buffer_size: int = option(200_000, "low-level transitions kept (C.2)")
    high_buffer_size: int = option(200_000, "high-level transitions kept (C.2)")
    # Differs 3: a uniformly random start
    start_steps: int = option(10_000, "environment steps before the first update")
    low_uniform_steps: int = option(10_000, "environment steps with uniformly random actions")
    high_uniform_steps: int = option(
        None, "environment steps with uniformly random subgoals (default: the task's)"
    )
    high_random: float = option(0.2, "share of subgoals that stay uniformly random after that")
    update_every: int = option(
        1, "environment steps per low-level update (C.2); high: c times that"
    )
    correction: bool = option(True, "relabel subgoals, the off-policy correction (3.3)")
    # Differs 9: the critic goes on seeing the subgoals that its actor asks for
    high_relabel: float = option(0.5, "share of high-level samples that the correction sees (3.3)")
    num_candidates: int = option(10, "candidates per relabelled subgoal, 2 fixed + random (C.3)")
    candidate_center: float = option(1.0, "random candidates' mean, in units of s_{t+c} - s_t")
    candidate_spread: float = option(0.5, "random candidates' std, in half-ranges (C.3)")

    @property
    def num_corrected(self):
        """Samples of a high-level batch that the correction sees."""
        return max(1, round(self.high_relabel * self.batch_size))

    def for_task(self, task):
        """This configuration with what it leaves to the task filled in."""
        of_task = {"high_uniform_steps": task.random_subgoals, "rest_step": task.rest_step}
        unset = {name: value for name, value in of_task.items() if getattr(self, name) is None}
        return replace(self, **unset)


PRESETS = {
    "td3": {},
    "paper": dict(
        low_relabel=0.0,
        rest_step=0,
        high_relabel=1.0,
        low_reward_scale=1.0,
        low_discount=0.99,
        high_discount=0.99,
        high_tau=0.005,
        high_reward_scale=0.1,
        units="raw",
        low_noise=1.0,
        high_noise=1.0,
        low_actor_lr=1e-4,
        low_critic_lr=1e-3,
        high_actor_lr=1e-4,
        high_critic_lr=1e-3,
        start_steps=2_500,
        low_uniform_steps=0,
        high_uniform_steps=0,
        high_random=0.0,
    ),
}


class Hierarchy:
    """Both policies acting in N environments at once (section 3.1): who wants what, since when."""

    def __init__(self, agent, num_envs):
        self.agent = agent
        self.subgoal = torch.zeros(num_envs, len(agent.subgoal_scale), device=agent.device)
        self.clock = torch.zeros(num_envs, dtype=torch.long, device=agent.device)  # in the segment

    def act(self, obs, explore):
        """Low-level actions [N, A]; at the start of a segment the high level acts first."""
        start = self.clock == 0  # Differs 11: an episode's first step included
        if start.any():
            fresh = self.agent.high_action(obs, explore)
            self.subgoal = torch.where(start[:, None], fresh, self.subgoal)
        return self.agent.low_action(obs, self.subgoal, explore)

    def advance(self, obs, next_obs, done):
        """The subgoals carried over to next_obs by h [N, d]."""
        self.subgoal = goal_transition(obs, self.subgoal, next_obs)
        self.clock = (self.clock + 1) % self.agent.config.subgoal_steps
        self.clock = self.clock.masked_fill(done, 0)  # a new episode asks for a subgoal of its own
        return self.subgoal

    PARTS = ("subgoal", "clock")

    def state_dict(self):
        return {name: getattr(self, name).clone() for name in self.PARTS}

    def load_state_dict(self, state):
        for name in self.PARTS:
            setattr(self, name, state[name].to(self.agent.device))


def has_bfloat16(device):
    """Whether the processor has instructions for bfloat16; without, it is very slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


class HIRO:
    """The agent: two TD3 learners, their buffers, and the hierarchy that acts.

    task      anything with the class attributes listed in envs.py
    num_envs  N, environments stepped together
    seed      of networks, exploration and sampling

    Observations, actions, rewards and flags come and go as arrays with a leading axis N.
    """

    def __init__(self, task, config=None, num_envs=1, seed=0, device="cpu"):
        self.config = (config or HIROConfig()).for_task(task)
        self.device = torch.device(device)
        self.bfloat16 = has_bfloat16(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.state_dim, self.low_blind = task.state_dim, task.low_blind
        self.subgoal_scale = torch.tensor(task.subgoal_scale, device=self.device)
        with torch.random.fork_rng(devices=[]):  # initial weights depend on the seed alone
            torch.manual_seed(seed)
            self._make_learners(task)
        self._make_buffers(task, num_envs)
        self.steps = 0  # environment steps observed
        self.hierarchy = Hierarchy(self, num_envs)

    def _make_learners(self, task):
        """Two TD3s, and how far each explores, in the units that its networks see."""
        config = self.config
        observation_scale = torch.tensor(task.observation_scale)
        subgoal_scale = torch.tensor(task.subgoal_scale)
        low_scale = torch.cat(
            [observation_scale[self.low_blind : self.state_dim], 1 / subgoal_scale]
        )
        one = torch.ones(task.action_dim)  # the half-range of actions
        if config.units == "range":  # Differs 1: networks see numbers of order one
            low_scales = dict(state_scale=low_scale, action_scale=one)
            high_scales = dict(state_scale=observation_scale, action_scale=1 / subgoal_scale)
            low_unit, high_unit = one, subgoal_scale  # of noise
        else:
            torque, raw = task.action_unit * one, torch.ones_like
            low_scales = dict(state_scale=raw(low_scale), action_scale=torque)
            high_scales = dict(state_scale=raw(observation_scale), action_scale=raw(subgoal_scale))
            low_unit, high_unit = 1 / torque, raw(subgoal_scale)

        def learner(level, max_action, unit, scales):
            names = "discount", "tau", "actor_lr", "critic_lr"
            own = {name: getattr(config, f"{level}_{name}") for name in names}
            return TD3(
                max_action=max_action,
                policy_noise=config.policy_noise * unit,
                noise_clip=config.noise_clip * unit,
                policy_delay=config.policy_delay,
                hidden=config.hidden,
                generator=self.generator,
                device=self.device,
                **own,
                **scales,
            )

        self.low = learner("low", one, low_unit, low_scales)
        self.high = learner("high", subgoal_scale, high_unit, high_scales)
        self.low_noise = (config.low_noise * low_unit).to(self.device)
        self.high_noise = (config.high_noise * high_unit).to(self.device)
        ranges = [actor.max_action for actor in (self.high.actor, self.high.actor_target)]
        ranges += [self.high.policy_noise, self.high.noise_clip, self.high_noise]
        self.high_ranges = [(used, used.clone()) for used in ranges]  # in use, and in full

    def _make_buffers(self, task, num_envs):
        """What each level remembers (3.1), and the high level's transitions under way."""
        config, d, c = self.config, len(self.subgoal_scale), self.config.subgoal_steps
        kwargs = dict(device=self.device, generator=self.generator)
        low_fields = {
            "state": (self.state_dim,),
            "subgoal": (d,),
            "action": (task.action_dim,),
            "reward": (),
            "next_state": (self.state_dim,),
            "next_subgoal": (d,),
            "terminated": (),
        }
        high_fields = {
            "state": (len(task.observation_scale),),  # what the high level saw, target included
            "subgoal": (d,),
            "states": (c, self.state_dim),  # s_t ... s_{t+c-1}, for the relabelling
            "actions": (c, task.action_dim),
            "mask": (c,),  # 1 for steps that happened
            "reward": (),
            "next_state": (len(task.observation_scale),),  # at t + c
            "terminated": (),
        }
        self.low_buffer = ReplayBuffer(config.low_buffer_size, low_fields, **kwargs)
        self.high_buffer = ReplayBuffer(config.high_buffer_size, high_fields, **kwargs)
        self.segment = {  # the unfinished high-level transition of each environment: [N, *shape]
            name: torch.zeros(num_envs, *high_fields[name], device=self.device)
            for name in ("state", "subgoal", "states", "actions", "reward")
        }

    # ------------------------------------------------------------------ acting

    def low_input(self, state, subgoal):
        """What the low level sees: the state without x and y, and the subgoal (authors' code)."""
        return torch.cat([state[..., self.low_blind : self.state_dim], subgoal], -1)

    def low_policy(self, state, subgoal):
        """mu^lo(s, g), the callable that relabelling takes."""
        return self.low.actor(self.low_input(state, subgoal))

    @torch.no_grad()
    def low_action(self, obs, subgoal, explore):
        """a_t [N, A] = mu^lo(s_t, g_t), exploring: with noise, clipped; uniform at first."""
        if explore and self.steps < self.config.low_uniform_steps:
            return self._uniform(len(obs), self.low.max_action)
        return self._explore(self.low_policy(obs, subgoal), self.low, self.low_noise, explore)

    @torch.no_grad()
    def high_action(self, obs, explore):
        """g_t [N, d] = mu^hi(s_t, target), exploring: with noise, clipped; uniform at first."""
        if explore and self.steps < self.config.high_uniform_steps:
            return self._uniform(len(obs), self.high.max_action)
        subgoal = self._explore(self.high.act(obs), self.high, self.high_noise, explore)
        if explore and self.config.high_random:
            chance = torch.rand(len(obs), 1, generator=self.generator, device=self.device)
            uniform = self._uniform(len(obs), self.high.max_action)
            subgoal = torch.where(chance < self.config.high_random, uniform, subgoal)
        return subgoal

    def _explore(self, action, level, noise, explore):
        if not explore:
            return action
        white = torch.randn(action.shape, generator=self.generator, device=self.device)
        return (action + noise * white).clamp(-level.max_action, level.max_action)

    def _uniform(self, n, half_range):
        shape = n, len(half_range)
        uniform = torch.rand(shape, generator=self.generator, device=self.device)
        return half_range * (2 * uniform - 1)

    def tensor(self, array, dtype=torch.float32):
        return torch.as_tensor(array, dtype=dtype, device=self.device)

    def act(self, obs, explore=True):
        """Actions [N, A] in [-1, 1] for observations [N, obs], as a numpy array."""
        return self.hierarchy.act(self.tensor(obs), explore).cpu().numpy()

    # ------------------------------------------------------------------ remembering

    def observe(self, obs, action, reward, next_obs, terminated, truncated):
        """Store one step of every environment in both buffers (section 3.1).

        obs, next_obs [N, obs]; action [N, A]; reward, terminated, truncated [N]. next_obs is the
        true successor, not the first observation of the next episode.
        """
        obs, action, reward = self.tensor(obs), self.tensor(action), self.tensor(reward)
        next_obs, terminated = self.tensor(next_obs), self.tensor(terminated)
        done = self.tensor(truncated, torch.bool) | terminated.bool()
        state, next_state = obs[:, : self.state_dim], next_obs[:, : self.state_dim]
        subgoal, clock = self.hierarchy.subgoal, self.hierarchy.clock

        rested = self.low_rests
        self.steps += len(obs)
        if self.low_rests != rested:
            self._set_reach()
        segment, first = self.segment, clock == 0
        env = torch.arange(len(obs), device=self.device)
        segment["states"][env, clock] = state
        segment["actions"][env, clock] = action
        segment["state"] = torch.where(first[:, None], obs, segment["state"])
        segment["subgoal"] = torch.where(first[:, None], subgoal, segment["subgoal"])
        segment["reward"] = torch.where(first, reward, segment["reward"] + reward)

        next_subgoal = self.hierarchy.advance(obs, next_obs, done)
        self.low_buffer.add(
            state=state,
            subgoal=subgoal,
            action=action,
            reward=self.low_reward(state, subgoal, next_state),
            next_state=next_state,
            next_subgoal=next_subgoal,
            terminated=terminated,
        )
        ended = self.hierarchy.clock == 0  # a full segment, or the end of the episode
        if ended.any():
            steps = torch.arange(self.config.subgoal_steps, device=self.device)
            mask = (steps <= clock[ended, None]).float()
            self.high_buffer.add(
                state=segment["state"][ended],
                subgoal=segment["subgoal"][ended],
                states=segment["states"][ended] * mask[..., None],
                actions=segment["actions"][ended] * mask[..., None],
                mask=mask,
                reward=self.config.high_reward_scale * segment["reward"][ended],
                next_state=next_obs[ended],
                terminated=terminated[ended],
            )

    def low_reward(self, state, subgoal, next_state):
        """What the low level learns from: the intrinsic reward (eq. 3), scaled (C.2)."""
        return self.config.low_reward_scale * intrinsic_reward(state, subgoal, next_state)

    # ------------------------------------------------------------------ learning

    @property
    def low_rests(self):
        """Whether the low level learns no more (Differs 10); it goes on acting."""
        return 0 < self.config.rest_step < self.steps

    def _set_reach(self):
        """Differs 10: once the low level rests, subgoals and their noise reach less far.

        Told a place nearby the ant walks there; told one far away it runs, and falls more often.
        """
        share = self.config.rest_reach if self.low_rests else 1.0
        for used, full in self.high_ranges:
            used[: self.low_blind] = share * full[: self.low_blind]  # x and y

    def update_low(self):
        """One TD3 step of the low level; returns its metrics."""
        batch = self.low_buffer.sample(self.config.batch_size)
        self.swap_subgoals(batch)
        batch["state"] = self.low_input(batch["state"], batch["subgoal"])
        batch["next_state"] = self.low_input(batch["next_state"], batch["next_subgoal"])
        return self.low.update(batch)

    def swap_subgoals(self, batch):
        """Differs 6: give the first low_relabel of a batch the subgoals of their neighbours (5.2).

        What the step did holds for any subgoal; only reward and next subgoal must follow.
        """
        n = round(self.config.low_relabel * len(batch["subgoal"]))
        state, next_state = batch["state"][:n], batch["next_state"][:n]
        subgoal = batch["subgoal"].roll(1, 0)[:n]  # rows are independent: any other will do
        batch["subgoal"][:n] = subgoal
        batch["reward"][:n] = self.low_reward(state, subgoal, next_state)
        batch["next_subgoal"][:n] = goal_transition(state, subgoal, next_state)

    def update_high(self):
        """Relabel with today's low level, then one TD3 step of the high level (3.3)."""
        batch = self.high_buffer.sample(self.config.batch_size)
        metrics = {}
        if self.config.correction:
            n = self.config.num_corrected
            batch["subgoal"][:n], index = self.correct({k: part[:n] for k, part in batch.items()})
            numbers = torch.arange(self.config.num_candidates, device=self.device)
            metrics["chosen"] = (index[:, None] == numbers).float().mean(0)
        batch["action"] = batch["subgoal"]
        return {**self.high.update(batch), **metrics}

    def correct(self, batch):
        """The off-policy correction on a sampled high-level batch: subgoal [B, d], index [B]."""
        # Differs 16: bfloat16 products; only the best of ten likelihoods is asked for
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return relabel(
                self.low_policy,
                batch["states"],
                batch["actions"],
                batch["subgoal"],
                batch["next_state"],
                self.high.max_action,
                mask=batch["mask"],
                num_random=self.config.num_candidates - 2,
                center=self.config.candidate_center,
                spread=self.config.candidate_spread,
                generator=self.generator,
            )

    # ------------------------------------------------------------------ saving

    PARTS = ("low", "high", "low_buffer", "high_buffer", "hierarchy")

    def state_dict(self):
        """All that the future of training depends on, as tensors and plain numbers."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        segment = {name: part.clone() for name, part in self.segment.items()}
        return {
            **parts,
            "segment": segment,
            "generator": self.generator.get_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        segment = state["segment"].items()  # written to in place, so it must not be the caller's
        self.segment = {name: part.to(self.device, copy=True) for name, part in segment}
        self.generator.set_state(state["generator"].cpu())
        self.steps = state["steps"]
        self._set_reach()

    def policy_dict(self):
        """The two actors alone: what evaluation needs."""
        return {
            level: {
                name: part.clone() for name, part in getattr(self, level).actor.state_dict().items()
            }
            for level in ("low", "high")
        }

    def load_policy_dict(self, policy):
        self.low.actor.load_state_dict(policy["low"])
        self.high.actor.load_state_dict(policy["high"])
