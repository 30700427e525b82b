"""What HIRO is made of, taken away or replaced: the paper's other rows (section 5.2, Table 1).

python results/variants.py NAME [flags of train.py]

no-correction    the high level learns from subgoals as they were set
own-subgoals     every low-level sample keeps its subgoal (HIRO as published; ours: half do)
random-subgoals  every low-level sample is given another one's subgoal
pre-training     the low level learns alone, on Gaussian subgoals, until --high-uniform-steps, and
                 then no more; set that, as its default is for one that goes on learning (the
                 paper: 2e6, a fifth of all steps)
no-hierarchy     one TD3 on the task, which weighs the future as HIRO's high level does: its
                 discount is .99^(1/c) per step. (By .99 per step, Push's trap is worth more than
                 its target to whoever walks less than 2.5 m/s.)

FeUdal Networks' parts (Vezhnevets et al. 2017) in HIRO's frame:

representation   subgoals are changes of phi(s), d numbers that the high level's critic learns
cosine           directions: r = cos(s' - s, g) at every step (FuN's is of the changes since each of
                 the last c steps, on average), and h leaves g as it is
transition       the transition policy gradient in place of the correction: the subgoal becomes
                 a draw around what happened (the columns relabelled and chosen_1 are 1)
feudal           all three

Reward scales are HIRO's in all of them, no-hierarchy's the high level's. Where subgoals are not
changes of the state (no-hierarchy, representation, cosine, feudal) the column subgoal_progress and
arrows in pictures mean nothing, and for no-hierarchy neither does intrinsic_return. It has no use
for flags of subgoals and of the high level, but for c (--subgoal-steps, in its discount) and
--high-reward-scale.
"""

import copy
import pathlib
import sys
import types

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import hiro
import relabel
import train
from buffers import ReplayBuffer
from harness import options
from hiro import HIRO, Policy, goal_transition
from relabel import candidate_subgoals, subgoal_sequences
from td3 import TD3, flatten


class PreTraining(HIRO):
    """HIRO, but the low level is trained alone and then frozen."""

    def _make_learners(self, task):
        if self.config.high_uniform_steps <= self.config.start_steps:
            steps = f"--high-uniform-steps {self.config.high_uniform_steps}"
            raise options.UserError(
                f"{steps}: the low level learns only from --start-steps until then"
            )
        super()._make_learners(task)

    def high_action(self, obs, fresh):
        if self.high_learns:
            return super().high_action(obs, fresh)
        still = torch.zeros(len(obs), len(self.max_subgoal), device=self.device)
        return self._explore(still, self.high, 0.5 * self.max_subgoal)

    def update_low(self):
        return {} if self.high_learns else super().update_low()


class FlatPolicy(Policy):
    def low_input(self, state, subgoal):
        return state[..., : len(self.low.state_scale)]


class NoHierarchy(HIRO):
    """HIRO, but its low level is paid the task's reward, sees all, and nobody sets it subgoals."""

    policy_class = FlatPolicy

    def _make_learners(self, task):
        only_in_range_units(self.config)
        super()._make_learners(task)
        scale, one = torch.tensor(task.observation_scale).float(), torch.ones(task.action_dim)
        scales = dict(state_scale=scale, action_scale=one)
        self.low = self._learner(one, one, **scales, **self._for_the_task())
        self.low.discount **= 1 / self.config.subgoal_steps
        self.low.squash_cost /= self.config.subgoal_steps  # one action moves Q by that much less

    def _make_buffers(self, task, num_envs):
        super()._make_buffers(task, num_envs)
        seen = len(task.observation_scale) + self.privileged_dim
        fields = {"state": (seen,), "action": (task.action_dim,), "next_state": (seen,)}
        fields |= {"reward": (), "terminated": (), "floor": ()}
        kwargs = dict(generator=self.generator, device=self.device)
        self.low_buffer = ReplayBuffer(self.config.buffer_size, fields, **kwargs)

    def remember_step(self, *_):
        pass

    def remember_segment(
        self, clock, obs, subgoal, action, reward, next_obs, terminated, done, ended
    ):
        floor = self.value_of_staying(reward)
        reward = self.config.high_reward_scale * reward
        row = dict(state=obs, action=action, reward=reward, next_state=next_obs)
        self.low_buffer.add(**row, terminated=terminated, floor=floor)

    def update_low(self):
        return self.low.update(self.low_buffer.sample(self.config.batch_size))

    def update_high(self):
        return {}


def only_in_range_units(config):
    """Raise UserError for --units raw: these networks' inputs are scaled."""
    if config.units == "raw":
        raise options.UserError("--units raw: this variant has no networks for it; use range")


# ---------------------------------------------------------------------- FeUdal Networks' parts


class TransitionPolicyGradient(HIRO):
    """HIRO, but a subgoal is relabelled as what happened, give or take .1 of the half-range."""

    def correct(self, batch):
        args = batch["state"], batch["next_state"], batch["subgoal"], self.max_subgoal
        draw = dict(num_random=1, spread=0.1, generator=self.generator)
        *_, drawn = relabel.candidate_subgoals(*args, **draw).unbind(1)
        what_happened = torch.ones(len(drawn), dtype=torch.long, device=self.device)
        return drawn, what_happened


class Directions(HIRO):
    """HIRO, but subgoals are directions (the functions below).

    They pay for no haste, so that nothing would hold the low level's outputs against squash_cost:
    its is 0.
    """

    def _make_learners(self, task):
        super()._make_learners(task)
        self.low.squash_cost = 0.0


# Where subgoals live: they are changes of embed(s), as places to reach or as directions.
space = types.SimpleNamespace(embed=lambda state: state, directions=False)


@torch.no_grad()
def transition_there(state, subgoal, next_state):
    """h(s, g, s') = g of a direction; else s + g - s', with embed(s) for s."""
    if space.directions:
        return subgoal
    return goal_transition(space.embed(state), subgoal, space.embed(next_state))


@torch.no_grad()
def reward_there(state, subgoal, next_state):
    """r = cos(s' - s, g) of a direction; else -‖s + g - s'‖, with embed(s) for s."""
    state, next_state = space.embed(state), space.embed(next_state)
    if not space.directions:
        # not hiro.intrinsic_reward: that looks up h, and would find the one above
        return -((goal_transition(state, subgoal, next_state) ** 2).sum(-1) ** 0.5)
    change = (next_state - state)[..., : subgoal.shape[-1]]
    norms = (change**2).sum(-1) ** 0.5 * (subgoal**2).sum(-1) ** 0.5
    return (change * subgoal).sum(-1) / (norms + 1e-8)


@torch.no_grad()
def candidates_there(state, next_state, *args, **kwargs):
    return candidate_subgoals(space.embed(state), space.embed(next_state), *args, **kwargs)


@torch.no_grad()
def sequences_there(states, candidates):
    if space.directions:
        return candidates[:, :, None].expand(-1, -1, states.shape[1], -1)
    return subgoal_sequences(space.embed(states), candidates)


def move_there():
    """Put these where the loop, the agent and the relabelling look for theirs."""
    for module in (train, hiro):
        module.goal_transition, module.intrinsic_reward = transition_there, reward_there
    relabel.candidate_subgoals, relabel.subgoal_sequences = candidates_there, sequences_there


class Sight(nn.Module):
    """What a high level sees: an observation with an embedding phi(s) in place of the state.

    GAIN  on phi: ten steps change it by about half of the subgoals' range before it has learned
    """

    GAIN = 5.0

    def __init__(self, state_scale, d, hidden):
        super().__init__()
        self.register_buffer("state_scale", state_scale.clone())
        layers = nn.Linear(len(state_scale), hidden), nn.ReLU(), nn.Linear(hidden, d)
        self.phi = nn.Sequential(*layers)  # initialised as torch does

    def embed(self, state):
        """phi(s): state [..., >= S], array or tensor -> [..., d], likewise."""
        if isinstance(state, np.ndarray):
            return self.embed(self.state_scale.new_tensor(state)).cpu().numpy()
        return self.GAIN * self.phi(state[..., : len(self.state_scale)] * self.state_scale)

    def forward(self, obs):
        return torch.cat([self.embed(obs), obs[..., len(self.state_scale) :]], -1)


class SeeingActor(nn.Module):
    def __init__(self, sight, actor):
        super().__init__()
        self.sight, self.actor, self.max_action = sight, actor, actor.max_action

    def forward(self, obs):
        return self.actor(self.sight(obs))


class SeeingPolicy(Policy):
    @classmethod
    def from_state_dict(cls, state, device="cpu"):
        parts = {"sight": {}, "actor": {}}
        for name, weights in state["high"].items():
            part, _, name = name.partition(".")
            parts[part][name] = weights
        policy = super().from_state_dict({**state, "high": parts["actor"]}, device)
        scale, hidden = parts["sight"]["state_scale"], len(parts["sight"]["phi.0.bias"])
        sight = Sight(scale, len(policy.high.max_action), hidden).to(device)
        sight.load_state_dict(parts["sight"])
        policy.high, space.embed = SeeingActor(sight, policy.high), sight.embed
        return policy


class SeeingTD3(TD3):
    """TD3, but it looks through a Sight, which the critic's loss teaches."""

    PARTS = (*TD3.PARTS, "sight", "sight_target", "sight_optimizer")

    def __init__(self, sight, critic_lr, **more):
        super().__init__(critic_lr=critic_lr, **more)
        self.sight, self.sight_target = sight, copy.deepcopy(sight).requires_grad_(False)
        self.sight_weights = [flatten(part) for part in (self.sight, self.sight_target)]
        self.sight_optimizer = torch.optim.Adam(sight.parameters(), critic_lr)

    def update(self, batch):
        view, next_view = self.sight(batch["state"]), self.sight_target(batch["next_state"])
        after = next_view, batch["terminated"], batch["floor"]
        target = self.target_q(batch["reward"], *after)
        loss = sum(F.huber_loss(q, target) for q in self.critic(view, batch["action"]))
        self.sight_optimizer.zero_grad()
        loss.backward()
        self.sight_optimizer.step()
        return super().update({**batch, "state": view.detach(), "next_state": next_view})

    @torch.no_grad()
    def _move_targets(self):
        super()._move_targets()
        sight, target = self.sight_weights
        target.lerp_(sight, self.tau)


class Representation(HIRO):
    """HIRO, but subgoals are changes, within ±1, of the high level's own view of the state.

    Old steps' rewards and next subgoals follow that view. What a subgoal asks for hangs on the
    place then, so the low level sees x and y; and on what the high level has learned, so that it
    learns from --start-steps on, or the low level would be taught for another view.
    """

    policy_class = SeeingPolicy
    high_learns = True

    def __init__(self, task, config=None, num_envs=1, seed=0, device="cpu"):
        changed = {"max_subgoal": np.ones_like(task.max_subgoal), "low_blind": 0}
        super().__init__(type(task.__name__, (task,), changed), config, num_envs, seed, device)
        sight = self.high.sight
        self.policy.high, space.embed = SeeingActor(sight, self.high.actor_target), sight.embed
        self.bfloat16 = False  # phi(s_{t+c}) - phi(s_t) may be a small part of either

    def _make_learners(self, task):
        only_in_range_units(self.config)
        super()._make_learners(task)
        one, scale = self.max_subgoal.cpu(), torch.tensor(task.observation_scale).float()
        sight = Sight(scale[: task.state_dim], len(one), self.config.hidden).to(self.device)
        scales = dict(state_scale=torch.cat([one, scale[task.state_dim :]]), action_scale=one)
        own = dict(sight=sight, **self._for_the_task())
        self.high = self._learner(one, one, SeeingTD3, **scales, **own)

    def swap_subgoals(self, batch):
        super().swap_subgoals(batch)
        step = batch["state"], batch["subgoal"], batch["next_state"]
        batch["reward"] = self.config.low_reward_scale * reward_there(*step)
        batch["next_subgoal"] = transition_there(*step)


class FeUdal(TransitionPolicyGradient, Directions, Representation):
    """HIRO, but with FeUdal Networks' representation, directions and policy gradient."""


VARIANTS = {  # name: the agent, flags
    "no-correction": (HIRO, ["--no-correction"]),
    "own-subgoals": (HIRO, ["--low-relabel=0"]),
    "random-subgoals": (HIRO, ["--low-relabel=1"]),
    "pre-training": (PreTraining, []),
    "no-hierarchy": (NoHierarchy, []),
    "representation": (Representation, []),
    "cosine": (Directions, []),
    "transition": (TransitionPolicyGradient, []),
    "feudal": (FeUdal, []),
}


def main(argv):
    name, *flags = argv or [None]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    with options.one_line_errors():
        if name not in VARIANTS:
            raise options.UserError(f"name a variant first: {', '.join(VARIANTS)}")
        trains = "eval_only" not in options.parse(flags)
    agent_class, more = VARIANTS[name]
    if name in ("representation", "cosine", "feudal"):
        space.directions = name != "representation"
        move_there()
    train.main(flags + more if trains else flags, agent_class, variant=name)


if __name__ == "__main__":
    main(sys.argv[1:])
