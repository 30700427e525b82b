"""HIRO: hierarchical reinforcement learning with off-policy correction (Nachum et al. 2018).

The high level says every c steps by how much the state should change (the subgoal); the low level
is rewarded for getting there. Both learn with TD3, from replay buffers of their own. Who calls
whom, step by step, is the loop in train.py.
"""

import math
from dataclasses import dataclass, field, replace

import torch

from buffers import ReplayBuffer
from relabel import relabel
from td3 import TD3, Actor

# ---------------------------------------------------------------------- 3.2: subgoals


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


# ---------------------------------------------------------------------- hyperparameters


def option(default, meaning, least=0, most=float("inf")):
    """A setting, its line of --help, and the smallest and largest value that make sense."""
    return field(default=default, metadata={"help": meaning, "least": least, "most": most})


TINY = 1e-12  # the least of what must be positive


@dataclass
class HIROConfig:
    """Hyperparameters of the agent. PRESETS["paper"] is appendix C, and --help shows both.

    A noise scale is a fraction of the half-range where units is "range", and in torque, metres
    and radians (m/s for the point) where units is "raw".
    """

    units: str = option("range", "of inputs and noise: range (fractions of it) or raw (m, rad)")
    subgoal_steps: int = option(10, "c: steps between two subgoals (3.1)", 1)
    discount: float = option(
        0.99, "gamma: low level per step, high level per c steps (C.2)", most=0.9999
    )
    # Differs 9: a value comes back by one decision per 1 / tau delayed updates
    tau: float = option(0.02, "tau of the target networks, both levels (C.2)", TINY, 1)
    buffer_size: int = option(200_000, "transitions kept, of each level (C.2)", 1)
    batch_size: int = option(100, "transitions per gradient step, both levels", 1)
    hidden: int = option(300, "units in each of the two hidden layers (C.1)", 1)
    # Differs 2: all noise in fractions of the range
    exploration_noise: float = option(0.2, "sigma of exploration, in --units (C.2)")
    policy_noise: float = option(0.2, "std of the target policy smoothing, in --units")
    noise_clip: float = option(0.5, "clip of the target policy smoothing, in --units")
    policy_delay: int = option(2, "critic updates per update of actor and targets", 1)
    actor_lr: float = option(1e-4, "Adam step size, both levels (C.2)", TINY)
    critic_lr: float = option(1e-3, "Adam step size, both levels (C.2)", TINY)
    # Differs 5: errors of Q near or within the Huber loss's quadratic part, which finds means
    low_reward_scale: float = option(0.1, "factor on the intrinsic reward (C.2)")
    high_reward_scale: float = option(
        None, "factor on the environment's reward (C.2; default: the task's)"
    )
    # Differs 4: half of the past seen with other subgoals
    low_relabel: float = option(
        0.5, "share of each low batch that gets the subgoals of other rows (5.2)", most=1
    )
    # Differs 3: a uniformly random start
    start_steps: int = option(10_000, "environment steps before the first update")
    low_uniform_steps: int = option(10_000, "environment steps with uniformly random actions")
    high_uniform_steps: int = option(
        None, "steps with random subgoals, before the high level learns (default: the task's)"
    )
    high_random_first: float = option(
        0.5, "later: chance that an episode begins with a random subgoal", most=1
    )
    high_random_again: float = option(
        0.02, "chance of a random subgoal after one of the high level's own", most=1
    )
    high_random_stays: float = option(
        0.9, "chance that a random subgoal is set for one more segment", most=1
    )
    # Differs 7: where the state leaves out the block, a jammed one has the value of a free one
    privileged_critic: bool = option(
        True, "in training the high level's critic sees what the state leaves out: blocks"
    )
    # Differs 6: tanh passes no gradient back from a corner; what Q leaves open is to be near 0
    squash_cost: float = option(0.01, "factor on the squares of an actor's outputs before tanh")
    # Differs 8: bootstrapping takes long to find out what staying is worth, at the target or in a
    # chasm, and where an ant lies on its back nothing holds its Q down
    bound_targets: bool = option(
        True, "to the high level no state is worth less than staying in it, or over 0 (distances)"
    )
    high_update_every: int = option(10, "low-level updates per high-level update (C.2)", 1)
    correction: bool = option(True, "relabel subgoals, the off-policy correction (3.3)")
    num_candidates: int = option(10, "candidates per relabelled subgoal, 2 fixed + random (C.3)", 2)

    def for_task(self, task):
        """This configuration, with the task's own values where it has none."""
        unset = [name for name, value in vars(self).items() if value is None]
        return replace(self, **{name: getattr(task, name) for name in unset})


PRESETS = {
    "default": {},
    "paper": dict(
        low_relabel=0.0,
        low_reward_scale=1.0,
        high_reward_scale=0.1,
        units="raw",
        tau=0.005,
        exploration_noise=1.0,
        start_steps=2_500,
        low_uniform_steps=0,
        high_uniform_steps=0,
        high_random_first=0.0,
        high_random_again=0.0,
        privileged_critic=False,
        squash_cost=0.0,
        bound_targets=False,
    ),
}


# ---------------------------------------------------------------------- 3.1: acting


class Policy:
    """Both actors, acting without noise in one environment or in N at once (section 3.1).

        policy = Policy.load("policy.pt")
        policy.reset()                # before an episode
        action = policy.act(obs)      # at every step: obs [obs] -> [A], or [N, obs] -> [N, A]

    subgoal_steps  c
    state_dim      entries of the state at the front of an observation
    low_blind      how many of them, at the front, the low level never sees (x and y)
    """

    NUMBERS = ("subgoal_steps", "state_dim", "low_blind")

    def __init__(self, low, high, subgoal_steps, state_dim, low_blind):
        self.low, self.high = low, high  # actors, which training may go on changing
        self.subgoal_steps, self.state_dim, self.low_blind = subgoal_steps, state_dim, low_blind
        self.reset()

    def low_input(self, state, subgoal):
        """What the low level sees: the state without x and y, and the subgoal (authors' code)."""
        return torch.cat([state[..., self.low_blind : self.state_dim], subgoal], -1)

    def low_action(self, state, subgoal):
        """mu^lo(s, g): the callable that relabelling takes; any leading dimensions."""
        return self.low(self.low_input(state, subgoal))

    def reset(self, done=None):
        """Forget the subgoal, of all environments or of those that are done [N]."""
        if done is None or self.clock is None:
            self.clock = self.subgoal = self.obs = None
        else:
            done = torch.as_tensor(done, device=self.clock.device)
            self.clock = self.clock.masked_fill(done, 0)

    @torch.no_grad()
    def act(self, obs):
        """Actions for observations, as an array; self.subgoal is what they aim at."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.high.max_action.device)
        if self.clock is None:
            self.clock = torch.zeros(obs.shape[:-1], dtype=torch.long, device=obs.device)
            d = len(self.high.max_action)
            self.obs, self.subgoal = obs, obs.new_zeros(*obs.shape[:-1], d)
        self.subgoal = goal_transition(self.obs, self.subgoal, obs)
        fresh = self.clock == 0  # an episode's first step too; the authors' code asks for 0 there
        if fresh.any():
            self.subgoal = torch.where(fresh[..., None], self.high(obs), self.subgoal)
        self.clock = (self.clock + 1) % self.subgoal_steps
        self.obs = obs.clone()  # the caller may write to its own array
        return self.low_action(obs, self.subgoal).cpu().numpy()

    def state_dict(self):
        """All that from_state_dict needs, cut loose from the training."""
        actors = {"low": self.low, "high": self.high}
        weights = {
            level: {name: part.clone() for name, part in actor.state_dict().items()}
            for level, actor in actors.items()
        }
        return {**weights, **{name: getattr(self, name) for name in self.NUMBERS}}

    @classmethod
    def from_state_dict(cls, state, device="cpu"):
        actors = []
        for level in ("low", "high"):
            weights = state[level]
            hidden = len(weights["net.0.bias"])
            actor = Actor(weights["max_action"], weights["state_scale"], hidden).to(device)
            actor.load_state_dict(weights)
            actors.append(actor)
        return cls(*actors, *(state[name] for name in cls.NUMBERS))

    @classmethod
    def load(cls, path, which="latest"):
        """A policy that train.py saved, not results/variants.py; which: latest or best."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("variant"):
            raise ValueError(f"{path} is a policy of the variant {saved['variant']}, not of HIRO")
        return cls.from_state_dict(saved[which]["policy"])


# ---------------------------------------------------------------------- the agent that learns


class HIRO:
    """The agent: two TD3 learners, the policy that their actors make, and what they remember.

    task      anything with the class attributes listed in envs.py
    num_envs  N, environments stepped together
    seed      of networks, exploration and sampling
    """

    policy_class = Policy
    PARTS = ("low", "high", "low_buffer", "high_buffer")

    def __init__(self, task, config=None, num_envs=1, seed=0, device="cpu"):
        self.config = (config or HIROConfig()).for_task(task)
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.max_subgoal = torch.tensor(task.max_subgoal, device=self.device).float()
        self.reward_lasts = task.reward_lasts
        # entries that an observation in training has at its end, besides what policies see
        self.privileged_dim = task.privileged_dim if self.config.privileged_critic else 0
        with torch.random.fork_rng(devices=[]):  # initial weights depend on the seed alone
            torch.manual_seed(seed)
            self._make_learners(task)
        # Differs 12: target actors; the online ones change too much from update to update
        actors = self.low.actor_target, self.high.actor_target
        numbers = self.config.subgoal_steps, task.state_dim, task.low_blind
        self.policy = self.policy_class(*actors, *numbers)
        self._make_buffers(task, num_envs)
        # where a processor multiplies it several times as fast, correct() reckons in bfloat16
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
        self.bfloat16 = self.device.type == "cpu" and fast
        self.steps = 0  # environment steps so far, of all N together

    def _make_learners(self, task):
        """Two TD3s, and how far each explores, in the units that its networks see."""
        config, reach = self.config, self.max_subgoal.cpu()
        seen = torch.tensor(task.observation_scale).float()
        low_seen = torch.cat([seen[task.low_blind : task.state_dim], 1 / reach])
        one = torch.ones(task.action_dim)  # the half-range of actions
        if config.units == "range":  # Differs 1: of the range of actions and subgoals
            low = dict(state_scale=low_seen, action_scale=one)
            high = dict(state_scale=seen, action_scale=1 / reach)
            low_unit, high_unit = one, reach  # of noise
        else:  # torque, metres and radians
            low = dict(state_scale=torch.ones_like(low_seen), action_scale=task.action_unit * one)
            high = dict(state_scale=torch.ones_like(seen), action_scale=torch.ones_like(reach))
            low_unit, high_unit = one / task.action_unit, torch.ones_like(reach)

        self.low = self._learner(one, low_unit, **low)
        self.high = self._learner(reach, high_unit, **high, **self._for_the_task())
        self.low_noise = (config.exploration_noise * low_unit).to(self.device)
        self.high_noise = (config.exploration_noise * high_unit).to(self.device)

    def _for_the_task(self):
        """What a TD3 that is paid the task's rewards has besides."""
        known = self.config.bound_targets and self.reward_lasts  # rewards are 0 at most
        return dict(privileged=self.privileged_dim, ceiling=0.0 if known else math.inf)

    def _learner(self, max_action, unit, kind=TD3, **more):
        """One level's TD3; unit: what its noise is measured in."""
        config = self.config
        return kind(
            max_action=max_action,
            discount=config.discount,
            tau=config.tau,
            policy_noise=config.policy_noise * unit,
            noise_clip=config.noise_clip * unit,
            policy_delay=config.policy_delay,
            squash_cost=config.squash_cost,
            actor_lr=config.actor_lr,
            critic_lr=config.critic_lr,
            hidden=config.hidden,
            generator=self.generator,
            device=self.device,
            **more,
        )

    def _make_buffers(self, task, num_envs):
        """What each level remembers (3.1), and the high level's transitions under way."""
        config, d, c = self.config, len(self.max_subgoal), self.config.subgoal_steps
        seen = len(task.observation_scale) + self.privileged_dim  # by the high level's critic
        kwargs = dict(device=self.device, generator=self.generator)
        low_fields = {
            "state": (task.state_dim,),
            "subgoal": (d,),
            "action": (task.action_dim,),
            "reward": (),
            "next_state": (task.state_dim,),
            "next_subgoal": (d,),
        }
        high_fields = {
            "state": (seen,),  # the whole observation: state, target, privileged
            "subgoal": (d,),
            "states": (c, task.state_dim),  # s_t ... s_{t+c-1}, for the relabelling
            "actions": (c, task.action_dim),
            "mask": (c,),  # 1 for steps that happened
            "reward": (),
            "next_state": (seen,),  # at t + c
            "terminated": (),
            "floor": (),  # of Q at t + c
        }
        self.low_buffer = ReplayBuffer(config.buffer_size, low_fields, **kwargs)
        self.high_buffer = ReplayBuffer(config.buffer_size, high_fields, **kwargs)
        self.segment = {  # the unfinished high-level transition of each environment: [N, *shape]
            name: torch.zeros(num_envs, *high_fields[name], device=self.device)
            for name in ("state", "subgoal", "states", "actions", "reward")
        }
        self.segment["random"] = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.segment["begins"] = torch.ones(num_envs, dtype=torch.bool, device=self.device)

    # ------------------------------------------------------------------ acting, to explore

    @torch.no_grad()
    def high_action(self, obs, fresh):
        """g_t [N, d]: mu^hi(s_t, target) with noise, clipped, or a uniformly random subgoal.

        Differs 3: until high_uniform_steps always a new random one, from which the low level
        learns to walk. After that every other episode begins with a random one that is set again
        and again, until a coin (high_random_stays) says no: it leads where no single one does, and
        sets out from the start, while from a dead end at which an episode waits nothing leads
        anywhere. In mid-episode one begins now and then, for what is far from the start.

        fresh  [N]  which of them will be used
        """
        own = self._explore(self.policy.high(obs), self.high, self.high_noise)
        config, begins, kept = self.config, self.segment["begins"], self.segment["subgoal"]
        new = self._uniform(len(obs), self.high.max_action)
        if self.steps < config.high_uniform_steps:
            return new
        coin = torch.rand(len(obs), generator=self.generator, device=self.device)
        stays = self.segment["random"] & ~begins
        chance = torch.where(stays, config.high_random_stays, config.high_random_again)
        random = coin < torch.where(begins, config.high_random_first, chance)
        self.segment["random"] = torch.where(fresh, random, self.segment["random"])
        return torch.where(random[:, None], torch.where(stays[:, None], kept, new), own)

    @torch.no_grad()
    def low_action(self, obs, subgoal):
        """a_t [N, A] = mu^lo(s_t, g_t) with noise, clipped; uniform at first."""
        if self.steps < self.config.low_uniform_steps:
            return self._uniform(len(obs), self.low.max_action)
        return self._explore(self.policy.low_action(obs, subgoal), self.low, self.low_noise)

    def _explore(self, action, level, noise):
        white = torch.randn(action.shape, generator=self.generator, device=self.device)
        return (action + noise * white).clamp(-level.max_action, level.max_action)

    def _uniform(self, n, half_range):
        shape = n, len(half_range)
        uniform = torch.rand(shape, generator=self.generator, device=self.device)
        return half_range * (2 * uniform - 1)

    # ------------------------------------------------------------------ 3.1: remembering

    def remember_step(self, obs, subgoal, action, reward, next_obs, next_subgoal):
        """The low level's transition (s_t, g_t, a_t, r_t, s_{t+1}, h(s_t, g_t, s_{t+1})) [N].

        next_obs is the true successor, not the first observation of the next episode; next_subgoal
        is h's at a segment's end too, where the authors' code stores the fresh one.
        """
        s = slice(self.policy.state_dim)
        self.low_buffer.add(
            state=obs[:, s],
            subgoal=subgoal,
            action=action,
            reward=self.config.low_reward_scale * reward,
            next_state=next_obs[:, s],
            next_subgoal=next_subgoal,
        )

    def remember_segment(
        self, clock, obs, subgoal, action, reward, next_obs, terminated, done, ended
    ):
        """The high level's transition (s_{t:t+c-1}, g_t, a_{t:t+c-1}, sum of R, s_{t+c}).

        It grows by one step; where ended [N], after c steps or with the episode, it is stored.
        clock  [N]  steps of the segment before this one
        """
        self.segment["begins"] = done
        segment, first = self.segment, clock == 0
        env = torch.arange(len(obs), device=self.device)
        segment["states"][env, clock] = obs[:, : self.policy.state_dim]
        segment["actions"][env, clock] = action
        segment["state"] = torch.where(first[:, None], obs, segment["state"])
        segment["subgoal"] = torch.where(first[:, None], subgoal, segment["subgoal"])
        segment["reward"] = torch.where(first, reward, segment["reward"] + reward)
        if ended.any():
            steps = torch.arange(self.config.subgoal_steps, device=self.device)
            mask = (steps <= clock[ended, None]).float()
            self.high_buffer.add(
                state=segment["state"][ended],
                subgoal=segment["subgoal"][ended],
                states=segment["states"][ended],
                actions=segment["actions"][ended],
                mask=mask,
                reward=self.config.high_reward_scale * segment["reward"][ended],
                next_state=next_obs[ended],
                terminated=terminated[ended],
                floor=self.value_of_staying(reward[ended]),
            )

    def value_of_staying(self, reward):
        """Differs 8: the least that a state is worth [N]: its reward [N] for ever.

        Where rewards are for events (not reward_lasts) that is 0; without bounds it is -inf.
        """
        if not self.config.bound_targets:
            return torch.full_like(reward, -torch.inf)
        segments = self.reward_lasts / (1 - self.config.discount)
        return self.config.high_reward_scale * self.config.subgoal_steps * segments * reward

    # ------------------------------------------------------------------ learning

    def due_updates(self, n):
        """The numbers of the updates that belong to the last n environment steps (C.2)."""
        now = self.steps - self.config.start_steps
        return range(max(0, now - n) + 1, max(0, now) + 1)

    @property
    def high_learns(self):
        """Differs 3: not while all subgoals are random.

        Learning from a low level that follows none saturated its actor (before item 6).
        """
        return self.steps > self.config.high_uniform_steps

    def update_low(self):
        """One TD3 step of the low level; returns its metrics."""
        batch = self.low_buffer.sample(self.config.batch_size)
        self.swap_subgoals(batch)
        see = self.policy.low_input
        batch["state"] = see(batch["state"], batch["subgoal"])
        batch["next_state"] = see(batch["next_state"], batch["next_subgoal"])
        # the way to a subgoal has no end: as r <= 0, an end would be the best that could happen
        batch["terminated"] = torch.zeros_like(batch["reward"])
        return self.low.update(batch)

    def swap_subgoals(self, batch):
        """Differs 4: give the first low_relabel of a batch the subgoals of their neighbours (5.2).

        What the step did holds for any subgoal; only reward and next subgoal must follow.
        """
        n = round(self.config.low_relabel * len(batch["subgoal"]))
        state, next_state = batch["state"][:n], batch["next_state"][:n]
        subgoal = batch["subgoal"].roll(1, 0)[:n]  # rows are independent: any other will do
        reward = self.config.low_reward_scale * intrinsic_reward(state, subgoal, next_state)
        batch["subgoal"][:n] = subgoal
        batch["reward"][:n] = reward
        batch["next_subgoal"][:n] = goal_transition(state, subgoal, next_state)

    def update_high(self):
        """Relabel with today's low level, then one TD3 step of the high level (3.3)."""
        batch = self.high_buffer.sample(self.config.batch_size)
        metrics = {}
        if self.config.correction:
            batch["subgoal"], index = self.correct(batch)
            numbers = torch.arange(self.config.num_candidates, device=self.device)
            metrics["chosen"] = (index[:, None] == numbers).float().mean(0)
        batch["action"] = batch["subgoal"]
        return {**self.high.update(batch), **metrics}

    def correct(self, batch):
        """The off-policy correction on a sampled high-level batch: subgoal [B, d], index [B]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return relabel(
                self.policy.low_action,
                batch["states"],
                batch["actions"],
                batch["subgoal"],
                batch["next_state"],
                self.high.max_action,
                mask=batch["mask"],
                num_random=self.config.num_candidates - 2,
                generator=self.generator,
            )

    # ------------------------------------------------------------------ saving

    def state_dict(self):
        """All that the future of training depends on, as tensors and plain numbers."""
        return {
            **{name: getattr(self, name).state_dict() for name in self.PARTS},
            "segment": {name: part.clone() for name, part in self.segment.items()},
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
