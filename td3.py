"""TD3: twin delayed deep deterministic policy gradient (Fujimoto, van Hoof, Meger 2018).

HIRO trains both of its levels with this algorithm (section 2.1). Nothing here knows of goals:
states, actions and rewards are tensors with a leading batch dimension.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def mlp(inputs, outputs, hidden):
    """Two hidden ReLU layers (C.1), initialised as in the authors' code.

    hidden weights U(±1/sqrt(fan_in)), output weights U(±.003), all biases 0
    """
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer in layers:
        bound = 0.003 if layer is layers[-1] else layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(layers[0], relu, layers[1], relu, layers[2])


def flatten(module):
    """Move a module's weights into one vector, so that Adam and target updates are one call each.

    returns  the vector; the module's parameters and their gradients are views of it and its grad
    """
    parameters = list(module.parameters())
    vector = parameters_to_vector(parameters).detach()
    vector_to_parameters(vector, parameters)
    vector.grad = torch.zeros_like(vector)
    parts = vector.grad.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return vector


class Actor(nn.Module):
    """Deterministic policy: state [..., >= S] -> max_action * tanh(net(state)) [..., A].

    max_action   [A]  half-range of each action dimension
    state_scale  [S]  factor on each network input; 1 shows the network raw numbers. Entries of a
                      state behind the first S are for critics, and not looked at
    """

    def __init__(self, max_action, state_scale, hidden=300):
        super().__init__()
        for name, value in (("max_action", max_action), ("state_scale", state_scale)):
            value = torch.as_tensor(value, dtype=torch.float32)
            self.register_buffer(name, value.clone())  # loading weights must not write to others
        self.net = mlp(len(self.state_scale), len(self.max_action), hidden)

    def forward(self, state):
        return self.max_action * torch.tanh(self.before_tanh(state))

    def before_tanh(self, state):
        return self.net(state[..., : len(self.state_scale)] * self.state_scale)


class Critic(nn.Module):
    """Two independent action values: (state, action) -> q1 [B], q2 [B].

    state_scale [S], action_scale [A]  factors on the network inputs
    """

    def __init__(self, state_scale, action_scale, hidden=300):
        super().__init__()
        scale = [torch.as_tensor(part, dtype=torch.float32) for part in (state_scale, action_scale)]
        self.register_buffer("scale", torch.cat(scale))
        self.net1 = mlp(len(self.scale), 1, hidden)
        self.net2 = mlp(len(self.scale), 1, hidden)

    def forward(self, state, action):
        x = self._input(state, action)
        return self.net1(x).squeeze(-1), self.net2(x).squeeze(-1)

    def q1(self, state, action):
        """The first value alone, which the actor climbs."""
        return self.net1(self._input(state, action)).squeeze(-1)

    def _input(self, state, action):
        # the authors' code lets the action in at the second layer too
        return torch.cat([state, action], -1) * self.scale


class TD3:
    """One TD3 learner; all noise scales are in action units.

    max_action    [A]  half-range of the actions; actions and smoothed target actions stay inside
    state_scale   [S]  input factors, see Actor; action_scale [A] likewise, see Critic
    privileged         U, entries that a state has besides, at its end, for the critics (factor 1)
    discount           gamma, per transition of the batch
    tau                targets move by this fraction at every delayed update
    policy_noise  [A]  std of the target policy smoothing; noise_clip [A] its clip
    policy_delay       actor and targets are updated at every policy_delay-th call
    ceiling            the most that a state can be worth
    squash_cost        factor on the squares of the actor's outputs before tanh, in its loss: keeps
                       it where tanh has a slope (Andrychowicz et al. 2017, appendix A), and near 0
                       what makes no difference to Q
    generator          source of the smoothing noise (default: torch's global one)
    """

    PARTS = (
        "actor",
        "critic",
        "actor_target",
        "critic_target",
        "actor_optimizer",
        "critic_optimizer",
    )

    def __init__(
        self,
        max_action,
        state_scale,
        action_scale,
        privileged=0,
        discount=0.99,
        tau=0.005,
        policy_noise=0.2,
        noise_clip=0.5,
        policy_delay=2,
        ceiling=math.inf,
        squash_cost=0.0,
        actor_lr=1e-4,
        critic_lr=1e-3,
        hidden=300,
        generator=None,
        device="cpu",
    ):
        self.actor = Actor(max_action, state_scale, hidden).to(device)
        critic_scale = torch.cat([torch.as_tensor(state_scale), torch.ones(privileged)])
        self.critic = Critic(critic_scale, action_scale, hidden).to(device)
        self.actor_target = Actor(max_action, state_scale, hidden).to(device)
        self.critic_target = Critic(critic_scale, action_scale, hidden).to(device)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.actor_target.requires_grad_(False)
        self.critic_target.requires_grad_(False)
        networks = self.actor, self.critic, self.actor_target, self.critic_target
        self.weights = [flatten(network) for network in networks]
        self.actor_optimizer = torch.optim.Adam(self.weights[:1], actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.weights[1:2], critic_lr, fused=True)

        self.max_action = self.actor.max_action
        self.discount, self.tau, self.policy_delay = discount, tau, policy_delay
        self.ceiling, self.squash_cost = ceiling, squash_cost
        self.policy_noise = torch.as_tensor(policy_noise, dtype=torch.float32, device=device)
        self.noise_clip = torch.as_tensor(noise_clip, dtype=torch.float32, device=device)
        self.generator = generator
        self.updates = 0

    @torch.no_grad()
    def target_q(self, reward, next_state, terminated, floor=None):
        """y = r + gamma (1 - terminated) min(Q1', Q2')(s', pi'(s') + clipped noise).

        Only termination stops the bootstrap; a time limit is none.
        floor  [B]  the least that the next states can be worth; the most is self.ceiling
        """
        action = self.actor_target(next_state)
        noise = torch.randn(action.shape, generator=self.generator, device=action.device)
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        # clipped to the range, as in TD3; in the authors' code it is not
        action = (action + noise).clamp(-self.max_action, self.max_action)
        q1, q2 = self.critic_target(next_state, action)
        q = torch.min(q1, q2).clamp(max=self.ceiling)
        if floor is not None:
            q = q.maximum(floor)
        return reward + self.discount * (1 - terminated.float()) * q

    def update(self, batch):
        """One gradient step on the critics and, every policy_delay calls, on the actor.

        batch    state [B, S + U], action [B, A], reward [B], next_state [B, S + U], terminated [B]
                 (0, 1 or bool) and, if there is one, floor [B] (see target_q); raises ValueError
                 for a reward, flag or floor that would broadcast
        returns  metrics: scalar tensors, still on the device; of the actor when it was updated
        """
        for name in ("reward", "terminated", "floor"):
            if name in batch and batch[name].dim() != 1:
                raise ValueError(f"{name} has shape {list(batch[name].shape)}, it must be [B]")
        self.updates += 1
        after = batch["next_state"], batch["terminated"], batch.get("floor")
        target = self.target_q(batch["reward"], *after)
        q1, q2 = self.critic(batch["state"], batch["action"])
        critic_loss = F.huber_loss(q1, target) + F.huber_loss(q2, target)
        self.critic_optimizer.zero_grad(set_to_none=False)
        critic_loss.backward()
        self.critic_optimizer.step()
        metrics = {"q": q1.detach().mean(), "critic_loss": critic_loss.detach()}

        if self.updates % self.policy_delay == 0:  # the authors' Adam steps in between, on zeros
            self.critic.requires_grad_(False)  # the actor's gradient passes through, nothing stays
            before = self.actor.before_tanh(batch["state"])
            action = self.max_action * torch.tanh(before)
            actor_loss = -self.critic.q1(batch["state"], action).mean()
            actor_loss = actor_loss + self.squash_cost * (before**2).sum(-1).mean()
            self.actor_optimizer.zero_grad(set_to_none=False)
            actor_loss.backward()
            self.actor_optimizer.step()
            self.critic.requires_grad_(True)
            self._move_targets()
            saturated = action.detach().abs() > 0.95 * self.max_action
            metrics["saturation"] = saturated.float().mean()
        return metrics

    @torch.no_grad()
    def _move_targets(self):
        """theta' <- theta' + tau (theta - theta')."""
        actor, critic, actor_target, critic_target = self.weights
        actor_target.lerp_(actor, self.tau)
        critic_target.lerp_(critic, self.tau)

    def state_dict(self):
        """Networks, targets, optimizers and the update counter: live views, as torch gives them."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {**parts, "updates": self.updates}

    def load_state_dict(self, state):
        state = copy.deepcopy(state)  # Adam would keep the very tensors that it is given
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.updates = state["updates"]
