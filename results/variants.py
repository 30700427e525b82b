"""What HIRO is made of, taken away or replaced: the paper's other rows (section 5.2, Table 1).

python results/variants.py NAME [flags of train.py]

no-correction    the high level learns from subgoals as they were set
random-subgoals  every low-level sample is given another one's subgoal
pre-training     the low level learns alone, on Gaussian subgoals, and then no more
no-hierarchy     one TD3 on the task
cosine           FeUdal Networks' directions: r = cos(s' - s, g), and h leaves g as it is
transition       FeUdal Networks' transition policy gradient in place of the correction
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import hiro
import relabel
import train
from buffers import ReplayBuffer
from harness import options
from hiro import HIRO, Policy


class PreTraining(HIRO):
    """HIRO, but the low level is trained alone and then frozen."""

    def high_action(self, obs, fresh):
        if self.high_learns:
            return super().high_action(obs, fresh)
        still = torch.zeros(len(obs), len(self.subgoal_scale), device=self.device)
        return self._explore(still, self.high, 0.5 * self.subgoal_scale)

    def update_low(self):
        return {} if self.high_learns else super().update_low()


class TransitionPolicyGradient(HIRO):
    """HIRO, but a subgoal is relabelled as what happened, give or take .1 of the half-range."""

    def correct(self, batch):
        args = batch["state"], batch["next_state"], batch["subgoal"], self.subgoal_scale
        draw = dict(num_random=1, spread=0.1, generator=self.generator)
        *_, drawn = relabel.candidate_subgoals(*args, **draw).unbind(1)
        what_happened = torch.ones(len(drawn), dtype=torch.long, device=self.device)
        return drawn, what_happened


class FlatPolicy(Policy):
    def low_input(self, state, subgoal):
        return state[..., : len(self.low.state_scale)]


class NoHierarchy(HIRO):
    """HIRO, but its low level is paid the task's reward, sees all, and nobody sets it subgoals."""

    def __init__(self, task, config=None, num_envs=1, seed=0, device="cpu"):
        super().__init__(task, config, num_envs, seed, device)
        config, one = self.config, torch.ones(task.action_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scales = dict(
                state_scale=torch.tensor(task.observation_scale).float(), action_scale=one
            )
            own = dict(critic_only=self.hidden_dim, discount=config.high_discount)
            self.low = self._learner("low", one, one, **scales, **own)
        seen = len(task.observation_scale) + self.hidden_dim
        fields = {"state": (seen,), "action": (task.action_dim,), "next_state": (seen,)}
        fields |= {"reward": (), "terminated": ()}
        kwargs = dict(generator=self.generator, device=self.device)
        self.low_buffer = ReplayBuffer(config.low_buffer_size, fields, **kwargs)
        actors = self.low.actor, self.high.actor
        self.policy = FlatPolicy(*actors, config.subgoal_steps, task.state_dim, task.low_blind)

    def remember_step(self, *_):
        pass

    def remember_segment(self, clock, obs, subgoal, action, reward, next_obs, terminated, ended):
        reward = self.config.high_reward_scale * reward
        row = dict(state=obs, action=action, reward=reward, next_state=next_obs)
        self.low_buffer.add(**row, terminated=terminated)

    def update_low(self):
        return self.low.update(self.low_buffer.sample(self.config.batch_size))

    def update_high(self):
        return {}


def cosine(state, subgoal, next_state):
    """r = cos(s' - s, g), in the units of the state; arguments as hiro.intrinsic_reward's."""
    change = (next_state - state)[..., : subgoal.shape[-1]]
    norms = (change**2).sum(-1) ** 0.5 * (subgoal**2).sum(-1) ** 0.5
    return (change * subgoal).sum(-1) / (norms + 1e-8)


def carried_over(state, subgoal, next_state):
    """h(s, g, s') = g."""
    return subgoal


def all_the_same(states, candidates):
    """relabel.subgoal_sequences where h carries subgoals over."""
    batch, k, d = candidates.shape
    return candidates[:, :, None].expand(batch, k, states.shape[1], d)


def directions():
    """Put cosine() and its h where the loop, the agent and the relabelling look for theirs."""
    for module in (train, hiro):
        module.goal_transition, module.intrinsic_reward = carried_over, cosine
    relabel.subgoal_sequences = all_the_same


VARIANTS = {  # name: the agent, flags
    "no-correction": (HIRO, ["--no-correction"]),
    "random-subgoals": (HIRO, ["--low-relabel=1"]),
    "pre-training": (PreTraining, []),
    "no-hierarchy": (NoHierarchy, []),
    "cosine": (HIRO, []),
    "transition": (TransitionPolicyGradient, []),
}


def main(argv):
    name, *flags = argv or [None]
    if name not in VARIANTS:
        raise options.UserError(f"name a variant first: {', '.join(VARIANTS)}")
    agent_class, more = VARIANTS[name]
    if name == "cosine":
        directions()
    train.start(options.parse([*flags, *more]), agent_class, variant=name)


if __name__ == "__main__":
    with options.one_line_errors():
        main(sys.argv[1:])
