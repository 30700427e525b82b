"""Tests section by section; each oracle is a naive loop or a number worked out in the test."""

import copy
import dataclasses
import functools
import math
import signal

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import buffers
import envs as tasks
import relabel
import train
from harness.options import RunConfig
from harness.runs import Run, make_envs
from hiro import HIRO, PRESETS, HIROConfig, Policy, goal_transition, intrinsic_reward
from td3 import TD3, Actor, Critic

torch.set_num_threads(1)
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # nested, to the bit
ANT_RANGE = [10, 10, 0.5, 1, 1, 1, 1] + 4 * [0.5, 0.3]  # of subgoals: m, quaternion, rad (C.1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stir(network, size=0.3, seed=3):
    """Random weights and biases: a fresh network answers about 0 to everything."""
    with torch.no_grad():
        for k, p in enumerate(network.parameters()):
            p.copy_(size * randn(*p.shape, seed=100 * seed + k))


def small(**changes):
    """An agent's configuration that learns nothing useful, quickly."""
    few = dict(hidden=16, batch_size=8, start_steps=40, low_uniform_steps=0, high_uniform_steps=0)
    few |= dict(high_random_first=0.0, high_random_again=0.0, low_relabel=0.0)
    return HIROConfig(**{**few, **changes})


class ClockTask(tasks.PointMaze):
    """A scripted world: observations tell time, episode and copy; every copy writes a log."""

    max_steps, logs = 20, []

    def __init__(self, evaluate=False, render_mode=None):
        super().__init__(evaluate)
        self.log, self.episode, self.copy = [], -1, len(ClockTask.logs)
        ClockTask.logs.append(self.log)

    def _reset_task(self):
        self.episode += 1

    def _observation(self):
        time = self.steps
        return np.array([time, time**2 / 10, self.episode, self.copy, time % 3, 9, 9], np.float32)

    def _task_step(self):  # odd episodes terminate before their last step, even ones are cut off
        return 1.0 + self.steps, self.episode % 2 == 1 and self.steps == 13 + self.copy

    def step(self, action):
        before, step = self._observation(), super().step(action)
        after, reward, terminated, *_ = step
        self.log.append((before, action.copy(), reward, after, terminated))
        return step


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """The loop of train.py, until the agent has made so many environment steps."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers

    def learn(agent, steps, task=ClockTask, **settings):
        ClockTask.logs = []
        settings = {"eval_episodes": 1, "num_envs": len(agent.segment["reward"]), **settings}
        run = Run(RunConfig("PointMaze", total_steps=steps, **settings), agent.config, tmp_path)
        run.task = task
        train.train(agent, run)

    return learn


# ------------------------------------------------------------ 3.2 subgoals are changes of state


def test_h_and_the_intrinsic_reward_by_hand__eq_2_and_3():
    """From (1, 2) by (5, 6) is to (6, 8): (3, 4) beyond (3, 4). Other entries do not matter."""
    state, subgoal, next_state = [1.0, 2.0, 50.0], [5.0, 6.0], [3.0, 4.0, -7.0]
    for kind in (torch.tensor, np.array):
        args = kind(state), kind(subgoal), kind(next_state)
        assert goal_transition(*args).tolist() == [3.0, 4.0]
        assert intrinsic_reward(*args) == -5.0


# ------------------------------------------------------------ 3.3 the off-policy correction


def policy(state, subgoal):
    """Something smooth that depends on every state and subgoal entry."""
    mixed = subgoal @ torch.tensor([[1.0, -1], [0.5, 2], [1, 1]])
    return torch.tanh(mixed + 0.1 * state.sum(-1, keepdim=True))


@pytest.mark.parametrize("random", [8, 4])  # 8: C.3
def test_relabel_equals_a_triple_loop__3_3(random):
    B, C, D = 5, 4, 3  # segments, steps, entries of a subgoal
    shapes = (B, C, 6), (B, C, 2), (B, D), (B, 6)
    states, actions, subgoal, next_state = (randn(*s, seed=i) for i, s in enumerate(shapes))
    scale = torch.tensor([0.5, 1.0, 2.0])  # every candidate is clipped to it (C.3)
    mask = torch.ones(B, C)
    mask[1, 2:] = 0  # a segment that ended after two steps
    generator = torch.Generator().manual_seed(5)
    args = policy, states, actions, subgoal, next_state, scale, mask
    given = {} if random == 8 else dict(num_random=random)
    chosen, index = relabel.relabel(*args, **given, generator=generator)
    args = states[:, 0], next_state, subgoal, scale
    every = relabel.candidate_subgoals(*args, **given, generator=generator.manual_seed(5))
    near = relabel.candidate_subgoals(
        *args, **given, spread=0.2, generator=generator.manual_seed(5)
    )
    noise = torch.randn(B, random, D, generator=generator.manual_seed(5))
    for b in range(B):
        change = next_state[b, :D] - states[b, 0, :D]
        for spread, listed in ((0.2, near), (0.5, every)):  # the last are those that relabel weighs
            drawn = [change + spread * scale * z for z in noise[b]]
            candidates = [g.minimum(scale).maximum(-scale) for g in (subgoal[b], change, *drawn)]
            torch.testing.assert_close(listed[b], torch.stack(candidates))
        scores = []
        for candidate in candidates:
            score, running = 0.0, candidate
            for i in range(2 if b == 1 else C):
                if i > 0:
                    running = states[b, i - 1, :D] + running - states[b, i, :D]
                score -= float(((actions[b, i] - policy(states[b, i], running)) ** 2).sum()) / 2
            scores.append(score)
        best = int(np.argmax(scores))
        assert index[b] == best
        torch.testing.assert_close(chosen[b], candidates[best])
        sequences = relabel.subgoal_sequences(states, every)
        found = relabel.log_likelihood(policy, states, actions, sequences, mask)[b]
        torch.testing.assert_close(found, torch.tensor(scores))


# ------------------------------------------------------------ 2.1, C.1, C.2 TD3


def learner(**changes):
    args = dict(max_action=[1.0, 2.0], state_scale=[0.5, 1.0, 2.0], action_scale=[2.0, 0.5])
    args |= dict(privileged=1)
    torch.manual_seed(0)
    return TD3(**args, hidden=8, generator=torch.Generator().manual_seed(0), **changes)


def td3_batch(seed=0):
    state, action, reward, next_state, end = randn(5, 32, 4, seed=seed)
    batch = dict(state=state, action=action[:, :2], reward=3 * reward[:, 0], next_state=next_state)
    return {**batch, "terminated": (end[:, 0] > 1).float()}


def test_updates_equal_a_naive_td3__2_1():
    """Fujimoto et al.'s algorithm 1, row by row; actor and targets at every second update (C.2)."""
    high, std, clip = torch.tensor([[1.0, 2.0], [0.4, 0.1], [0.5, 0.15]])
    more = dict(policy_noise=std, noise_clip=clip, ceiling=0.4)
    td3 = learner(discount=0.9, tau=0.25, actor_lr=1e-3, critic_lr=2e-3, squash_cost=0.3, **more)
    parts = "actor", "critic", "actor_target", "critic_target"
    for seed, part in enumerate(parts):
        stir(getattr(td3, part), 1.0, seed)
    naive = [copy.deepcopy(getattr(td3, part)) for part in parts]
    actor, critic, actor_target, critic_target = naive
    adam = torch.optim.Adam(actor.parameters(), 1e-3), torch.optim.Adam(critic.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)

    def before_tanh(network, state):  # the scales are units of what networks see
        return network.net(torch.tensor([0.5, 1.0, 2.0]) * state[..., :3])  # the fourth: not seen

    def mu(network, state):
        return high * torch.tanh(before_tanh(network, state))

    def q(network, state, action):
        seen = torch.tensor([0.5, 1.0, 2.0, 1.0, 2.0, 0.5]) * torch.cat([state, action], -1)
        return network.net1(seen)[..., 0], network.net2(seen)[..., 0]

    for update in range(1, 6):
        batch, loss = td3_batch(seed=update), 0.0
        floor = randn(32, seed=update) if update > 2 else torch.full((32,), -torch.inf)
        expected = {"q": q(critic, batch["state"], batch["action"])[0].mean().item()}
        noise = torch.randn(32, 2, generator=generator)
        for i in range(32):
            state, action, reward, next_state, terminated = (part[i] for part in batch.values())
            smoothing = (std * noise[i]).minimum(clip).maximum(-clip)
            next_action = (mu(actor_target, next_state) + smoothing).minimum(high).maximum(-high)
            bootstrap = min(*q(critic_target, next_state, next_action), torch.tensor(0.4))
            bootstrap = max(bootstrap, floor[i]).item()
            target = float(reward) + (0.0 if terminated else 0.9 * bootstrap)
            for value in q(critic, state, action):
                error = abs(value - target)  # Huber
                loss = loss + (error**2 / 2 if error < 1 else error - 0.5) / 32
        adam[1].zero_grad()
        loss.backward()
        adam[1].step()
        expected["critic_loss"] = loss.item()
        if update % 2 == 0:
            action = mu(actor, batch["state"])
            squared = (before_tanh(actor, batch["state"]) ** 2).sum(1).mean()
            adam[0].zero_grad()
            (0.3 * squared - q(critic, batch["state"], action)[0].mean()).backward()
            adam[0].step()
            expected["saturation"] = (action.abs() > 0.95 * high).float().mean().item()
            for online, target in ((actor, actor_target), (critic, critic_target)):
                for new, old in zip(online.parameters(), target.parameters(), strict=True):
                    old.data = 0.75 * old.data + 0.25 * new.data
        more = {"floor": floor} if update > 2 else {}
        found = {name: value.item() for name, value in td3.update(batch | more).items()}
        assert found == pytest.approx(expected, 1e-4)
        for part, network in zip(parts, naive, strict=True):
            found, wanted = getattr(td3, part).parameters(), network.parameters()
            torch.testing.assert_close(list(found), list(wanted), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(td3.actor(batch["state"]), mu(actor, batch["state"]))


def test_update_takes_boolean_flags_and_refuses_what_would_broadcast():
    batch, losses = td3_batch(), []
    for terminated in batch["terminated"], batch["terminated"].bool():
        losses.append(learner().update({**batch, "terminated": terminated})["critic_loss"])
    assert losses[0] == losses[1]
    for name in ("reward", "terminated", "floor"):
        with pytest.raises(ValueError, match=name):
            learner().update({**batch, name: torch.zeros(32, 1)})


def test_networks_have_the_paper_s_shape_and_initialisation__C_1():
    torch.manual_seed(0)
    high = np.full(8, 30, np.float32)
    td3 = TD3(high, torch.ones(43), torch.ones(8))
    shapes = [tuple(p.shape) for p in td3.actor.parameters()]
    assert shapes == [(300, 43), (300,), (300, 300), (300,), (8, 300), (8,)]
    for net in (td3.actor.net, td3.critic.net1, td3.critic.net2):
        assert [type(net[i]) for i in (1, 3)] == 2 * [torch.nn.ReLU]
        bounds = [layer.in_features**-0.5 for layer in (net[0], net[2])] + [0.003]
        for layer, bound in zip((net[0], net[2], net[4]), bounds, strict=True):
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()
    assert not torch.equal(td3.critic.net1[0].weight, td3.critic.net2[0].weight)
    assert_same(td3.actor.state_dict(), td3.actor_target.state_dict())
    assert_same(td3.critic.state_dict(), td3.critic_target.state_dict())
    assert Actor(high, [1.0]).net[0].out_features == 300
    assert Critic([1.0], high).net1[0].out_features == 300
    assert 29 < td3.actor(1e6 * randn(100, 43)).abs().max() <= 30
    td3.actor.max_action[:] = 1.0  # the range is a copy, of the caller's and for each network
    assert (high == 30).all() and (td3.actor_target.max_action == 30).all()


# ------------------------------------------------------------ the replay buffer


def test_buffer_wraps_and_samples_uniformly_what_was_written():
    generator = torch.Generator().manual_seed(0)
    buffer = buffers.ReplayBuffer(10, {"value": (), "pair": (2,)}, generator=generator)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    written = []
    for start in (0, 4, 8, 12):  # the third addition wraps
        values = torch.arange(start, start + 4.0)
        buffer.add(value=values, pair=torch.stack([values, -values], 1))
        written = [*written, *values.tolist()][-10:]
        assert len(buffer) == len(written)
        batch = buffer.sample(20_000)
        assert torch.equal(batch["pair"], torch.stack([batch["value"], -batch["value"]], 1))
        values, counts = batch["value"].unique(return_counts=True)
        assert values.tolist() == written
        assert (counts * len(written) / 20_000 - 1).abs().max() < 0.1


def test_buffer_state_holds_what_was_written_and_nothing_else():
    fields = {"x": (3,), "y": (2, 2)}
    buffer, other = buffers.ReplayBuffer(9, fields), buffers.ReplayBuffer(9, fields)
    x, y = randn(12, 3), randn(12, 2, 2)
    buffer.add(y=y[:7], x=x[:7])
    state = buffer.state_dict()
    assert state["storage"].shape == (7, 7) and torch.equal(buffer.rows()["x"], x[:7])
    other.load_state_dict(state)
    for each in (buffer, other):  # both go on in the same slot
        each.add(x=x[7:], y=y[7:])
        assert torch.equal(each.rows()["x"], torch.cat([x[9:], x[3:9]]))
        assert torch.equal(each.rows()["y"], torch.cat([y[9:], y[3:9]]))
    assert torch.equal(state["storage"][:, :3], x[:7]), "what was saved stays"
    with pytest.raises(ValueError, match="do not fit"):
        buffers.ReplayBuffer(9, {"x": (3,)}).load_state_dict(state)
    with pytest.raises(KeyError, match="rows have"):
        buffer.add(x=x)


# ------------------------------------------------------------ 3.1 who acts when, what is stored


@pytest.mark.parametrize("num_envs, c", [(1, 5), (3, 6)])  # 5 divides the episode's 20 steps
def test_both_buffers_hold_exactly_the_expected_tuples__3_1(num_envs, c, learn):
    changes = dict(subgoal_steps=c, start_steps=10**6, exploration_noise=0.0)
    changes |= dict(low_reward_scale=0.5, high_reward_scale=0.1)
    agent = HIRO(ClockTask, small(**changes), num_envs)
    low_actor, high_actor = agent.low.actor_target, agent.high.actor_target
    stir(low_actor), stir(high_actor)
    learn(agent, 70 * num_envs, ClockTask)
    low, high = agent.low_buffer.rows(), agent.high_buffer.rows()
    logs = ClockTask.logs[:num_envs]  # not of the evaluation after them
    assert [len(log) for log in logs] == num_envs * [70] and len(low["reward"]) == 70 * num_envs

    segments, subgoal = [], None
    for i, log in enumerate(logs):
        for t, (obs, action, _, next_obs, terminated) in enumerate(log):
            row = {name: part[t * num_envs + i] for name, part in low.items()}
            expected = {"state": obs[:5], "action": action, "next_state": next_obs[:5]}
            for name, value in expected.items():
                np.testing.assert_array_equal(row[name], value)
            if obs[0] % c == 0:
                first, steps = row["subgoal"], []
            else:  # between two decisions of the high level the stored g_{t+1} is used
                assert torch.equal(row["subgoal"], subgoal)
            subgoal = row["next_subgoal"]
            miss = obs[:2] + row["subgoal"].numpy() - next_obs[:2]
            np.testing.assert_allclose(subgoal, miss, rtol=1e-5)  # h
            assert math.isclose(row["reward"], -0.5 * np.linalg.norm(miss), rel_tol=1e-5)
            steps.append(log[t])
            if len(steps) == c or terminated or next_obs[0] == 20:  # full, terminated or cut off
                segments.append((t, i, first, steps))
    # without noise they are these actors' own answers to what they are stored with
    seen = torch.cat([low["state"][:, 2:], low["subgoal"]], 1)
    torch.testing.assert_close(low["action"], low_actor(seen))
    torch.testing.assert_close(high["subgoal"], high_actor(high["state"]))

    assert len(high["reward"]) == len(segments)
    assert {len(steps) for *_, steps in segments} > {c}, "some segments must be short"
    for j, (_, _, first, steps) in enumerate(sorted(segments, key=lambda s: s[:2])):
        states, actions, rewards, after, terminated = zip(*steps, strict=True)
        n = len(steps)
        row = {name: part[j] for name, part in high.items()}
        row["states"], row["actions"] = row["states"][:n], row["actions"][:n]
        for name, value in {
            "state": states[0],
            "subgoal": first,
            "states": [state[:5] for state in states],
            "actions": actions,
            "mask": n * [1] + (c - n) * [0],
            "next_state": after[-1],
            "terminated": terminated[-1],
        }.items():
            np.testing.assert_array_equal(row[name], value)
        assert math.isclose(row["reward"], 0.1 * sum(rewards), rel_tol=1e-6)


@pytest.mark.parametrize("lasts, bounded", [(True, True), (False, True), (True, False)])
def test_a_state_is_worth_between_its_reward_for_ever_and_0(lasts, bounded, learn, monkeypatch):
    """Of the stay, 2,000 segments are summed by hand: .9 to that power is nothing."""
    few = dict(subgoal_steps=6, discount=0.9, high_reward_scale=0.5, start_steps=10**6)
    monkeypatch.setattr(ClockTask, "reward_lasts", lasts)
    agent = HIRO(ClockTask, small(**few, bound_targets=bounded))
    learn(agent, 20 + 13, ClockTask)  # cut off, terminated; step t's reward is 1 + t
    last = torch.tensor([7.0, 13, 19, 21, 7, 13, 14])
    stay = sum(0.9**k * 0.5 * 6 for k in range(2000))
    stay = stay if lasts else 0.0
    expected = stay * last if bounded else torch.full((7,), -torch.inf)
    torch.testing.assert_close(agent.high_buffer.rows()["floor"], expected)
    assert (
        agent.high.ceiling == (0 if lasts and bounded else math.inf)
        and agent.low.ceiling == math.inf
    )


def test_exploration_noise_has_the_stated_scale_and_is_clipped__C_2():
    ant, obs, zero = torch.tensor(ANT_RANGE), torch.zeros(99, 32), torch.zeros(99, 15)
    fresh = torch.ones(99, dtype=torch.bool)
    for units, noise, low, high in (("range", 0.4, 0.4, 0.4 * ant), ("raw", 2, 2 / 30, 2)):
        few = small(units=units, exploration_noise=noise)
        agent = HIRO(tasks.AntMaze, few)  # fresh actors answer 0 to 0
        generator = agent.generator.clone_state()
        low_white, high_white = (torch.randn(99, width, generator=generator) for width in (8, 15))
        torch.testing.assert_close(agent.low_action(obs, zero), (low * low_white).clamp(-1, 1))
        expected = (high * high_white).minimum(ant).maximum(-ant)
        torch.testing.assert_close(agent.high_action(obs, fresh), expected)


def test_each_level_starts_with_uniform_draws_for_as_long_as_it_is_told():
    N = 20_000
    few = small(low_uniform_steps=10, high_uniform_steps=20, exploration_noise=0.0)
    agent = HIRO(tasks.AntMaze, few, num_envs=N)
    obs, zero, fresh = torch.zeros(N, 32), torch.zeros(N, 15), torch.ones(N, dtype=torch.bool)
    for agent.steps in (0, 9, 10, 19, 20):
        for uniform, draw, scale in (
            (agent.steps < 10, agent.low_action(obs, zero), torch.ones(8)),
            (agent.steps < 20, agent.high_action(obs, fresh), torch.tensor(ANT_RANGE)),
        ):
            quarters = torch.tensor([0.0, 0.25, 0.5, 0.75, 1])
            quartiles = torch.quantile(draw / scale, quarters, dim=0)
            expected = (2 * quarters - 1)[:, None].expand_as(quartiles)
            torch.testing.assert_close(quartiles, uniform * expected, atol=0.03, rtol=0)


RANDOM = dict(high_random_first=0.4, high_random_again=0.2, high_random_stays=0.75)


@pytest.mark.parametrize(
    "uniform_steps, first, again, kept", [(0, *RANDOM.values()), (99, 1.0, 1.0, 0.0)]
)
def test_random_subgoals_stay_where_it_is_their_turn_and_not_in_school(
    uniform_steps, first, again, kept
):
    N, changes = 20_000, dict(RANDOM, exploration_noise=0.0)
    agent = HIRO(tasks.PointMaze, small(high_uniform_steps=uniform_steps, **changes), num_envs=N)
    obs, fresh = randn(N, 7), torch.arange(N) % 4 > 0
    own, subgoals = agent.policy.high(obs), []
    for begins in (True, False):
        agent.segment["begins"] = torch.full((N,), begins)
        agent.segment["subgoal"] = agent.high_action(obs, fresh)
        subgoals.append(agent.segment["subgoal"])
    assert not agent.segment["random"][~fresh].any()  # their turn to draw has not come
    before, subgoal = subgoals
    was_random, random = ((drawn != own).all(1) for drawn in subgoals)
    assert ((subgoal[random] / 5).std(0) - 3**-0.5).abs().max() < 0.02  # uniform in ±5
    repeated = (subgoal == before).all(1)
    for happened, where, chance in (
        (was_random, fresh, first),
        (random, fresh & ~was_random, again),
        (repeated, fresh & was_random, kept),
    ):
        assert not where.any() or abs(happened[where].float().mean() - chance) < 0.02


def test_episodes_begin_with_a_random_subgoal_that_stays_for_a_while(learn):
    few = dict(high_random_first=0.8, high_random_again=0.0, high_random_stays=0.6)
    few |= dict(exploration_noise=0.0, subgoal_steps=1, start_steps=9999)
    agent = HIRO(ClockTask, small(**few), num_envs=4)
    learn(agent, 6000)
    rows, episodes = agent.high_buffer.rows(), {}
    random = (rows["subgoal"] - agent.policy.high(rows["state"])).abs().amax(1) > 1e-4
    where = rows["state"][:, 2:4].tolist()  # episode, copy
    for key, subgoal, drawn in zip(where, rows["subgoal"].tolist(), random, strict=True):
        episodes.setdefault(tuple(key), []).append(subgoal if drawn else None)
    firsts, lengths = set(), []
    for subgoals in episodes.values():
        lengths.append(subgoals.index(None) if None in subgoals else len(subgoals))
        assert all(subgoal == subgoals[0] for subgoal in subgoals[: lengths[-1]])
        assert not any(subgoals[lengths[-1] :])  # never again in this episode
        firsts |= {tuple(subgoals[0] or ())}
    for least in range(3):  # geometric
        more = np.mean([length > least for length in lengths])
        assert abs(more - 0.8 * 0.6**least) < 0.06
    drawn = np.array(list(firsts - {()})) / 5
    assert len(drawn) == sum(length > 0 for length in lengths)  # each episode has its own
    quartiles = np.quantile(drawn, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(quartiles, [[-0.5] * 2, [0.0] * 2, [0.5] * 2], atol=0.2)


# ------------------------------------------------------------ 3.1, 3.3 learning


def test_gradient_steps_follow_environment_steps__C_2(learn):
    """A low update an environment step, high ones at their pace; none before start_steps."""
    for num_envs, steps, changes, low, high in (
        (1, 145, {}, 105, 10),
        (1, 145, dict(high_update_every=3, subgoal_steps=7), 105, 35),
        (4, 148, {}, 108, 10),
        (1, 145, dict(high_uniform_steps=90), 105, 5),  # it learns when its subgoals are its own
    ):
        agent = HIRO(tasks.PointMaze, small(**changes), num_envs)
        learn(agent, steps)
        assert (agent.steps, agent.low.updates, agent.high.updates) == (steps, low, high)


def remembering(agent, n=64):
    """The agent with n random rows in both buffers; what it would learn from goes to `seen`."""
    seen = []
    for buffer, level in ((agent.low_buffer, agent.low), (agent.high_buffer, agent.high)):
        fields = enumerate(buffer.fields.items())
        buffer.add(**{name: randn(n, *shape, seed=i) for i, (name, shape) in fields})
        level.update = lambda batch: seen.append(batch) or {}
    return seen


def stored_as(batch, buffer, key):
    """The rows that a batch was drawn from; key: a field that comes through unchanged."""
    stored = buffer.rows()
    row = torch.cdist(batch[key].view(8, -1), stored[key].view(64, -1)).argmin(1)
    return {name: part[row] for name, part in stored.items()}


@pytest.mark.parametrize("share, swapped", [(0.0, 0), (0.3, 2)])  # of 8, rounded
def test_low_update_learns_from_rows_some_with_another_one_s_subgoal__3_1__5_2(share, swapped):
    agent = HIRO(tasks.PointMaze, small(low_relabel=share, low_reward_scale=2.0))
    seen = remembering(agent)
    agent.update_low()
    batch, rows = seen[0], stored_as(seen[0], agent.low_buffer, "action")
    assert len(batch["reward"]) == 8
    assert torch.equal(batch["terminated"], torch.zeros(8))  # the way to a subgoal has no end
    for i in range(8):
        state, next_state, g = rows["state"][i], rows["next_state"][i], rows["subgoal"][i]
        left, reward = rows["next_subgoal"][i], rows["reward"][i]
        if i < swapped:
            g = rows["subgoal"][i - 1]
            left = state[:2] + g - next_state[:2]
            reward = torch.tensor(-2.0 * math.hypot(*left))
        torch.testing.assert_close(batch["state"][i], torch.cat([state[2:], g]))
        torch.testing.assert_close(batch["next_state"][i], torch.cat([next_state[2:], left]))
        torch.testing.assert_close(batch["reward"][i], reward)
        assert torch.equal(batch["action"][i], rows["action"][i])


def test_correction_asks_today_s_low_level_with_the_agent_s_settings__3_3():
    agent = HIRO(tasks.PointMaze, small(num_candidates=5))
    batch = {name: randn(2000, *shape) for name, shape in agent.high_buffer.fields.items()}
    batch["mask"] = (torch.arange(10) < 4).float().expand(2000, 10)  # short segments
    args = [batch[name] for name in ("states", "actions", "subgoal", "next_state")]
    args += torch.tensor([5.0, 5.0]), batch["mask"], 3

    def today(state, subgoal):
        return agent.low.actor_target(torch.cat([state[..., 2:], subgoal], -1))

    for seed in range(2):
        stir(agent.low.actor_target, seed=seed)
        generators = agent.generator.clone_state(), agent.generator.clone_state()
        subgoal, index = relabel.relabel(today, *args, generator=generators[0])
        agent.bfloat16 = False
        assert_same(agent.correct(batch), (subgoal, index))
        assert len(index.unique()) == 5
        agent.bfloat16, agent.generator = True, generators[1]
        rounded, chosen = agent.correct(batch)
        assert rounded.dtype == torch.float32 and 0.9 < (chosen == index).float().mean() < 1
        same = chosen == index
        assert torch.equal(rounded[same], subgoal[same])


@pytest.mark.parametrize("correction", [True, False])
def test_high_update_learns_from_corrected_subgoals_and_stores_none__3_3(correction):
    agent = HIRO(tasks.PointMaze, small(num_candidates=3, correction=correction))
    seen, given = remembering(agent), []
    before = copy.deepcopy(agent.high_buffer.rows())
    new, index = torch.full((8, 2), 7.0), torch.arange(8) % 2
    agent.correct = lambda batch: given.append(copy.deepcopy(batch)) or (new, index)
    metrics = agent.update_high()
    assert_same(agent.high_buffer.rows(), before)
    batch, rows = seen[0], stored_as(seen[0], agent.high_buffer, "reward")
    assert len(batch["reward"]) == 8
    assert all(torch.equal(batch[name], rows[name]) for name in ("state", "reward", "next_state"))
    assert torch.equal(batch["action"], new if correction else rows["subgoal"])
    assert_same(given, [rows] if correction else [])
    assert "chosen" in metrics if correction else "chosen" not in metrics
    assert not correction or metrics["chosen"].tolist() == [0.5, 0.5, 0]


def test_each_level_gets_its_hyperparameters__C_2():
    rates = dict(actor_lr=0.1, critic_lr=0.2)
    both = dict(discount=0.5, tau=0.6, buffer_size=70, policy_delay=8, squash_cost=0.9, hidden=10)
    agent = HIRO(tasks.AntMaze, HIROConfig(**rates, **both))
    for name in ("low", "high"):
        td3, buffer = getattr(agent, name), getattr(agent, f"{name}_buffer")
        adams = td3.actor_optimizer, td3.critic_optimizer
        assert [adam.param_groups[0]["lr"] for adam in adams] == [0.1, 0.2]
        found = td3.discount, td3.tau, buffer.capacity, td3.policy_delay, td3.squash_cost
        assert (*found, td3.actor.net[0].out_features) == tuple(both.values())


DEFAULT = {
    **dict(units="range", subgoal_steps=10, batch_size=100, hidden=300, correction=True),
    **dict(discount=0.99, tau=0.02, buffer_size=200_000, exploration_noise=0.2),
    **dict(policy_noise=0.2, noise_clip=0.5, policy_delay=2),
    **dict(actor_lr=1e-4, critic_lr=1e-3),
    **dict(low_reward_scale=0.1, high_reward_scale=None, high_update_every=10),
    **dict(start_steps=10_000, low_uniform_steps=10_000, high_uniform_steps=None),
    **dict(num_candidates=10, low_relabel=0.5, privileged_critic=True),
    **dict(high_random_first=0.5, high_random_again=0.02, high_random_stays=0.9),
    **dict(squash_cost=0.01, bound_targets=True),
}
PAPER = {  # appendix C and the authors' code
    **dict(DEFAULT, units="raw", tau=0.005, exploration_noise=1.0),
    **dict(low_reward_scale=1.0, high_reward_scale=0.1),
    **dict(start_steps=2_500, low_uniform_steps=0, high_uniform_steps=0),
    **dict(low_relabel=0.0, privileged_critic=False, squash_cost=0.0, bound_targets=False),
    **dict(high_random_first=0.0, high_random_again=0.0),
}


def test_presets__C():
    assert dataclasses.asdict(HIROConfig(**PRESETS["default"])) == DEFAULT
    assert dataclasses.asdict(HIROConfig(**PRESETS["paper"])) == PAPER
    assert (RunConfig().eval_every, RunConfig().eval_episodes) == (50_000, 50)  # C.4
    names = "high_uniform_steps", "high_reward_scale"
    for given, *expected in ((None, 300_000, 3e-4), (0, 0, 0), (5, 5, 5)):
        config = HIROConfig(**dict.fromkeys(names, given)).for_task(tasks.AntMaze)
        assert [getattr(config, name) for name in names] == expected  # None: the task's


def test_what_networks_see_and_noise_is_measured_in__C_1():
    one, ant = torch.ones, torch.tensor(ANT_RANGE)
    state = torch.tensor(13 * [1] + 14 * [0.2] + [1])  # without x and y
    place = torch.ones(2)
    own, raw = (HIRO(tasks.AntMaze, small(units=units)) for units in ("range", "raw"))
    for level, actor_sees, critic_sees_besides, limit, unit in (
        (own.low, torch.cat([state, 1 / ant]), one(8), one(8), one(8)),
        (own.high, torch.cat([place, state, place]), 1 / ant, ant, ant),
        (raw.low, one(43), 30 * one(8), one(8), one(8) / 30),
        (raw.high, one(32), one(15), ant, one(15)),
    ):
        for found, expected in (
            (level.actor.state_scale, actor_sees),
            (level.critic.scale, torch.cat([actor_sees, critic_sees_besides])),
            (level.max_action, limit),
            (level.policy_noise, 0.2 * unit),
            (level.noise_clip, 0.5 * unit),
        ):
            torch.testing.assert_close(found, expected)


def test_nothing_but_the_high_level_s_critic_sees_the_block(learn):
    agent = HIRO(tasks.PointPush, small())
    learn(agent, 60, tasks.PointPush)
    low, high = agent.low_buffer.rows(), agent.high_buffer.rows()
    assert (low["state"].shape[1], high["state"].shape[1], high["next_state"].shape[1]) == (5, 9, 9)
    scale = torch.tensor([1, 1, 0.2, 0.2])  # m, m, and of the subgoal
    torch.testing.assert_close(agent.high.critic.scale[-4:], scale)
    with_block, state = high["state"], high["state"].clone()
    state[:, 7:] += 1
    assert torch.equal(agent.policy.high(state), agent.policy.high(with_block[:, :7]))
    values = [agent.high.critic.q1(each, high["subgoal"]) for each in (state, with_block)]
    assert not torch.equal(*values)
    agent = HIRO(tasks.PointPush, small(privileged_critic=False))
    learn(agent, 60, tasks.PointPush)
    assert agent.high_buffer.rows()["state"].shape[1] == 7


def test_a_loaded_agent_goes_on_the_same_and_the_state_stays_the_caller_s(learn):
    agent, other = (HIRO(tasks.PointMaze, small(), seed=seed) for seed in range(2))
    learn(agent, 65)
    state, before = (copy.deepcopy(agent.state_dict()) for _ in range(2))
    other.load_state_dict(state)
    assert_same([other.state_dict(), other.segment], [before, agent.segment])
    for each in (agent, other):
        learn(each, 130)
    assert_same(agent.state_dict(), other.state_dict())
    assert_same(state, before)


# ------------------------------------------------------------ C.4 evaluation


def test_a_saved_policy_asks_the_high_level_every_c_steps_and_follows_h_between__3_1(tmp_path):
    agent = HIRO(tasks.PointMaze, small(subgoal_steps=4, hidden=12))
    low, high = agent.low.actor_target, agent.high.actor_target
    saved, path = {}, tmp_path / "policy.pt"
    for seed, which in enumerate(("best", "latest")):  # training goes on between
        stir(low, seed=seed), stir(high, seed=seed)
        saved[which] = {"policy": agent.policy.state_dict()}
    torch.save(saved, path)
    together, alone = Policy.load(path), [Policy.load(path) for _ in range(3)]
    obs, done = randn(14, 3, 7), torch.zeros(14, 3, dtype=torch.bool)
    done[5, 1] = done[10, 0] = done[10, 2] = True
    subgoal, age, seen = [None] * 3, [0] * 3, np.empty((3, 7), np.float32)
    for t in range(14):
        seen[:] = obs[t]  # the same array at every step, as some environments return it
        actions = together.act(seen)
        for i in range(3):
            if age[i] % 4 == 0:
                subgoal[i] = high(obs[t, i])
            else:
                subgoal[i] = obs[t - 1, i, :2] + subgoal[i] - obs[t, i, :2]
            torch.testing.assert_close(together.subgoal[i], subgoal[i].detach())
            action = low(torch.cat([obs[t, i, 2:5], subgoal[i]])).detach().numpy()
            for found in actions[i], alone[i].act(obs[t, i]):
                np.testing.assert_allclose(found, action, rtol=1e-4, atol=1e-6)
            age[i] = 0 if done[t, i] else age[i] + 1
            if done[t, i]:
                alone[i].reset()
        together.reset(done[t].numpy())
    together.reset()  # for any number of environments
    together.reset(done[5].numpy())  # an episode may end before the policy has been asked
    assert np.array_equal(together.act(obs[0, :2]), Policy.load(path).act(obs[0, :2]))
    stir(low, seed=0), stir(high, seed=0)
    assert np.array_equal(Policy.load(path, "best").act(obs[0]), agent.policy.act(obs[0]))


def test_evaluation_of_a_hand_worked_episode__C_4():
    """Success is what the last step says: 5 m away is none, though in between it was near."""
    places = [(0.0, 8.0), (3.0, 8.0), (3.0, 11.0), (3.0, 12.0), (3.0, 8.0)]
    envs = make_envs(tasks.PointMaze, 1, evaluate=True)
    point = envs.envs[0].unwrapped
    point.max_steps, watched = 4, []

    def go():
        point.data.qpos[:2], point.target = places[point.steps], np.array([3.0, 13.0])
        return -point._distance(), False

    def high(obs):  # asks for (3, 4) at the start and for (0, -3) two steps later
        return torch.tensor([[3.0, 4.0] if obs[0, 0] == 0 else [0.0, -3.0]])

    def watch(t, obs, subgoal):
        watched.append((t, tuple(obs[0, :2]), tuple(subgoal[0])))

    point._reset_task, point._task_step, high.max_action = go, go, torch.ones(2)
    policy = Policy(lambda seen: torch.zeros(1, 2), high, 2, state_dim=5, low_blind=2)
    policy.act(torch.zeros(1, 7))  # an evaluation begins afresh
    (result,) = train.evaluate(policy, envs, 1, 0, watch)
    asked = [(3.0, 4.0), (0.0, 4.0), (0.0, -3.0), (0.0, -4.0)]
    assert watched == list(zip(range(4), places, asked, strict=False))
    # misses (0, 4), (0, 1), then (0, -4), none; segments begin 5 and 3 away, end 1 and 0 away
    expected = {"steps": 4, "intrinsic_return": -9, "subgoal_progress": (4 + 3) / 2}
    assert result == {**expected, "return": -(5 + 2 + 1 + 5), "distance": 5, "success_rate": 0}


def test_more_episodes_than_copies_and_copies_that_end_early__C_4():
    """Two copies, three episodes; copy 0's end after 3 steps, and its numbers stop there."""
    envs = make_envs(tasks.PointMaze, 2, evaluate=True)
    first, second = [env.unwrapped for env in envs.envs]
    first._task_step, first._distance = lambda: (-1.0, first.steps == 3), lambda: 4.0
    second._task_step, second._distance = lambda: (-1.0, False), lambda: 6.0
    second.max_steps, seeds = 9, []
    reset = first.reset
    first.reset = lambda **kwargs: seeds.append(kwargs["seed"]) or reset(**kwargs)
    results = train.evaluate(HIRO(tasks.PointMaze, small()).policy, envs, 3, seed=5)
    names = "steps", "return", "distance", "success_rate"
    found = [[result[name] for name in names] for result in results]
    assert found == [[3, -3.0, 4.0, 1.0], [9, -9.0, 6.0, 0.0], [3, -3.0, 4.0, 1.0]]
    assert [seed for seed in seeds if seed is not None] == [5, 7]
    assert train.mean(results)["return"] == -5.0


def test_evaluation_leaves_training_untouched__C_4(learn):
    agents = [HIRO(tasks.PointMaze, small(), num_envs=3) for _ in range(2)]
    for agent, every in zip(agents, (15, 1000), strict=True):
        learn(agent, 90, eval_every=every, eval_episodes=2)
    assert_same(*(agent.state_dict() for agent in agents))


# ------------------------------------------------------------ appendix B, the tasks


def make(name, **kwargs):
    """A task, at the start of an episode."""
    env = gymnasium.make(f"hiro/{name}-v0", **kwargs).unwrapped
    env.reset(seed=0)
    return env


STATE = 15 * [1] + 14 * [0.2] + [1]
ANT = dict(state_dim=30, action_dim=8, low_blind=2, max_subgoal=ANT_RANGE, action_unit=30)
ANT |= dict(max_steps=500, total_steps=10**7, high_uniform_steps=300_000, score="success_rate")
ANT |= dict(high_reward_scale=3e-4, reward_lasts=True)
ANT |= dict(observation_scale=STATE + [1, 1])
POINT = dict(state_dim=5, action_dim=2, low_blind=2, max_subgoal=[5, 5], action_unit=4)
POINT |= dict(max_steps=300, total_steps=150_000, high_uniform_steps=20_000, score="success_rate")
POINT |= dict(high_reward_scale=3e-4, reward_lasts=True)
POINT |= dict(observation_scale=[1, 1, 0.2, 0.2, 1, 1, 1])
ATTRIBUTES = {
    "AntMaze": ANT,
    "AntPush": ANT,
    "AntFall": dict(ANT, observation_scale=STATE + [1, 1, 1]),
    "AntGather": ANT
    | dict(observation_scale=STATE + 20 * [1], score="return")
    | dict(high_reward_scale=0.3, reward_lasts=False),
    "PointMaze": POINT,
    "PointPush": dict(POINT, action_unit=2),
}


def test_what_hiro_must_know_of_each_task__B():
    assert tasks.TASKS.keys() == ATTRIBUTES.keys()
    for name, attributes in ATTRIBUTES.items():
        for attribute, expected in attributes.items():
            found = getattr(tasks.TASKS[name], attribute)
            found = found.astype(float).round(6).tolist() if hasattr(found, "tolist") else found
            assert found == expected, (name, attribute)


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.filterwarnings("error")
def test_gymnasium_s_checker_has_nothing_to_say(name):
    check_env(make(name), skip_render_check=True)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_an_episode_is_cut_off_at_its_last_step_and_rewards_nearness__B(name):
    env = make(name)
    for step in range(1, env.max_steps + 1):
        obs, reward, terminated, truncated, info = env.step(np.zeros(env.action_dim))
        assert not terminated and truncated == (step == env.max_steps)
        if name != "AntGather":
            place, target = obs[: len(env.target)], obs[env.state_dim :]
            assert reward == -info["distance"]
            assert math.isclose(info["distance"], math.dist(place, target), rel_tol=1e-5)
            assert info["is_success"] == (info["distance"] < 5)


def test_nearness_to_fall_s_target_is_measured_in_three_dimensions__B():
    env = make("AntFall")
    for place, distance in (((0, 27, 0.5), 4), ((3, 27, 0.5), 5), ((0, 24, 4.5), 3)):
        env.data.qpos[:3] = place
        assert env._info()["distance"] == distance and env._task_step()[0] == -distance


def test_only_gather_ends_with_a_fall__B():
    for name in ("AntMaze", "AntPush", "AntFall", "AntGather"):
        env = make(name)
        for height, fallen in ((0.19, True), (0.21, False), (0.99, False), (1.01, True)):
            env.data.qpos[2] = height
            assert env._task_step()[1] == (fallen and name == "AntGather")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_seeded_reset_is_reproducible_and_state_is_complete(name):
    first, second = make(name), make(name)
    assert np.array_equal(first.reset(seed=3)[0], second.reset(seed=3)[0])
    assert not np.array_equal(first.reset(seed=4)[0], first.reset(seed=5)[0])
    actions = np.random.default_rng(0).uniform(-1, 1, (60, first.action_dim))
    for action in actions[:30]:
        first.step(action)
    second.set_state(copy.deepcopy(first.get_state()))
    for action in actions[30:]:
        assert_same(first.step(action), second.step(action))
    assert_same(first.reset(), second.reset())  # the random generator is part of the state


def test_training_and_evaluation_targets__B():
    maze = make("AntMaze")
    targets = np.array([maze.reset(seed=i)[0][30:] for i in range(300)])
    assert targets.min() >= -4 and targets.max() <= 20
    np.testing.assert_allclose(targets.std(0), 24 / 12**0.5, atol=1)  # uniform
    for name, target in (("AntMaze", (0, 16)), ("AntPush", (0, 19)), ("AntFall", (0, 27, 4.5))):
        for evaluate in (True,) if name == "AntMaze" else (True, False):
            assert np.array_equal(make(name, evaluate=evaluate).reset(seed=1)[0][30:], target)


def test_the_state_is_positions_velocities_and_scaled_time__B():
    env = make("AntPush")  # the block is not observed
    for _ in range(7):
        obs, *_ = env.step(np.full(8, 0.5))
    expected = [*env.data.qpos[:15], *env.data.qvel[:14], 0.001 * 7]
    np.testing.assert_allclose(obs[:30], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name, joints", [("AntPush", "xy"), ("PointPush", "xy"), ("AntFall", "yz")]
)
def test_the_block_s_displacement_is_shown_on_request_only(name, joints):
    env, shown = make(name), make(name, privileged=True)
    for each in env, shown:
        each.reset(seed=0)
        for joint, place in zip(joints, (0.3, -0.2), strict=True):
            each.data.joint(f"block_{joint}").qpos = place
    assert np.array_equal(shown._observation(), [*env._observation(), *np.float32([0.3, -0.2])])
    assert shown.observation_space.contains(shown._observation())


def test_a_reset_scatters_every_joint__B():
    env = make("AntPush")
    obs = np.array([env.reset(seed=seed)[0] for seed in range(500)])
    position, velocity = obs[:, :15] - env.model.qpos0[:15], obs[:, 15:29]
    assert np.abs(position).max() <= 0.1 + 1e-6  # uniform
    np.testing.assert_allclose(position.std(0), 0.1 / 3**0.5, rtol=0.1)
    np.testing.assert_allclose(velocity.std(0), 0.1, rtol=0.15)  # normal
    assert np.abs(velocity).max() > 0.25 and np.abs(velocity.mean(0)).max() < 0.025


@pytest.mark.parametrize("name, blocks", [("AntMaze", 0), ("AntPush", 2), ("AntFall", 2)])
def test_the_ant_is_rllab_s__B(name, blocks):  # blocks: their joints
    env = make(name)
    model = env.model
    mass = model.body_mass.sum() - (model.body("block").mass[0] if blocks else 0)
    assert np.allclose([mass, model.body("torso").mass[0]], [0.91088, 0.32725], rtol=0, atol=5e-6)
    assert (model.nq, model.nv, model.nu) == (15 + blocks, 14 + blocks, 8)
    assert model.opt.timestep == 0.02 and model.opt.integrator == 1 and env.frame_skip == 5
    assert (model.actuator_gear[:, 0] == 1).all() and (model.actuator_ctrlrange == [-30, 30]).all()
    order = [model.joint(int(j)).name for j in model.actuator_trnid[:, 0]]
    assert order == [f"{part}_{leg}" for leg in (4, 1, 2, 3) for part in ("hip", "ankle")]
    joints = 6 * [0] + 8 * [1] + blocks * [0]
    assert model.dof_armature.tolist() == joints and model.dof_damping.tolist() == joints
    degrees = np.rad2deg(model.jnt_range[1:9]).round(6).tolist()
    hip, up, down = [-30, 30], [30, 70], [-70, -30]
    assert degrees == [hip, up, hip, down, hip, down, hip, up]
    hard = 0.995 if blocks else 0.8
    assert np.allclose(model.geom_solimp[:, :3], [hard, hard, 0.01])
    assert (model.geom_condim == 3).all() and np.allclose(model.geom_solref, [0.02, 1])
    assert np.allclose(model.geom_margin, 0.005) and np.allclose(model.geom_friction, [1, 0.5, 0.5])
    ant = [i for i in range(model.ngeom) if model.geom(i).name.endswith("_geom")]
    assert (model.geom_conaffinity[ant] == 0).all() and len(ant) == 13
    assert (np.delete(model.geom_conaffinity, ant) == 1).all()
    for action, torque in ((0.5, 15), (2, 30)):
        env.step(np.full(8, action))
        assert (env.data.ctrl == torque).all()
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros(7))


def test_a_resting_ant_is_as_high_as_on_the_original_contacts__B():
    env = make("AntMaze")
    for margin, height in ((0.005, 0.520), (0.01, 0.551)):  # .01 each would be twice the original
        env.model.geom_margin[:] = margin
        env.data.qpos[:], env.data.qvel[:] = env.model.qpos0, 0
        for _ in range(50):
            env.step(np.zeros(8))
        assert abs(env.data.qpos[2] - height) < 0.002


LAYOUTS = {
    "AntMaze": ["#####", "#R..#", "###.#", "#...#", "#####"],
    "AntPush": ["#####", "#.R##", "#.B.#", "##.##", "#####"],
    "AntFall": ["####", "#R.#", "#.Z#", "#~~#", "#..#", "####"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout__B(name):
    env, drawing, floor = make(name), LAYOUTS[name], 4 * (name == "AntFall")
    model, column = env.model, next(row.index("R") for row in drawing if "R" in row)
    expected = set()
    for i, row in enumerate(drawing, -1):
        for j, cell in enumerate(row):
            x, y = 8 * (j - column), 8 * i
            if floor and cell != "~":
                expected.add((x, y, 2, 4, 4, 2))
            if cell in "#B":
                expected.add((x, y, floor + 2, 4, 4, 2))
            if cell == "Z":
                expected.add((x, y, 6, 3.96, 3.96, 2))
    boxes = [i for i in range(model.ngeom) if model.geom_type[i] == 6]
    found = [(*env.data.geom_xpos[i], *model.geom_size[i]) for i in boxes]
    assert {tuple(np.round(box, 6)) for box in found} == expected and len(found) == len(expected)
    assert (model.geom_contype[boxes] == 1).all() and math.isclose(model.qpos0[2], floor + 0.75)
    if name != "AntMaze":
        push = name == "AntPush"
        axes = [[1, 0, 0], [0, 1, 0]] if push else [[0, 1, 0], [0, 0, 1]]
        ranges = 0 if push else [[-8, 8], [-4, 0]]
        assert math.isclose(model.body("block").mass[0], 0.0002 if push else 0.001)
        assert (model.jnt_axis[-2:] == axes).all() and (model.jnt_range[-2:] == ranges).all()
        assert (model.jnt_limited[-2:] != push).all() and np.allclose(model.jnt_margin[-2:], 0.01)
        assert (env.data.qpos[-2:] == 0).all() and (env.data.qvel[-2:] == 0).all()


def drag(env, velocity, until, seconds=30):
    """Pull the torso along, legs limp, until until() holds; returns whether it ever did."""
    torso = env.model.body("torso").id
    for _ in range(int(seconds / env.model.opt.timestep)):
        env.data.xfrc_applied[torso, :2] = 20 * (np.array(velocity) - env.data.qvel[:2])
        mujoco.mj_step(env.model, env.data)
        if until():
            return True
    return False


def test_push_block_bars_the_way_until_it_is_pushed_aside__B():
    env = make("AntPush")
    block, arrived = env.data.qpos[15:], lambda: env._info()["is_success"]
    assert not drag(env, (0, 1.5), arrived), "straight ahead"
    env.reset(seed=0)
    assert drag(env, (-1.5, 0), lambda: env.data.qpos[0] < -6)
    assert drag(env, (0, 1.5), lambda: env.data.qpos[1] > 7.5)
    assert drag(env, (1.5, 0), lambda: block[0] > 7.9), "the block gives way"
    assert abs(block[1]) < 0.05 and np.allclose(env.block_places, [[7.9, 8]], atol=0.1)
    assert drag(env, (-1, 0), lambda: env.data.qpos[0] < 0.5) and block[0] > 7.5
    assert drag(env, (0, 1.5), arrived), "the way is open"


@pytest.mark.parametrize("name, radius, force", [("PointMaze", 0.4, 80), ("PointPush", 0.7, 6)])
def test_the_ball_is_driven_by_velocity(name, radius, force):
    model = make(name).model
    ball = [i for i in range(model.ngeom) if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_SPHERE]
    assert model.geom_size[ball][:, 0].tolist() == [radius] and model.body("torso").mass == 1
    assert (model.geom_condim[ball], model.geom_conaffinity[ball]) == (1, 0)
    assert model.opt.timestep == 0.02 and model.opt.integrator == 1
    kv, bias = model.actuator_gainprm[:, 0], model.actuator_biasprm[:, 2]
    assert kv.tolist() == [20, 20] and bias.tolist() == [-20, -20]
    assert (model.actuator_forcerange == [-force, force]).all()


def test_the_ball_must_go_round_the_block__B():
    for way, arrives in (([(0, 19)], False), ([(-8, 0), (-8, 8), (0.3, 8), (0, 19)], True)):
        env, place = make("PointPush", evaluate=True), (0, 0)
        for _ in range(env.max_steps):
            if len(way) > 1 and math.dist(place, way[0]) < 0.5:
                way = way[1:]
            ahead = np.subtract(way[0], place)
            (*place, _, _, _, _, _), *_, info = env.step(ahead / np.linalg.norm(ahead))
        assert info["is_success"] == arrives


def test_fall_block_drops_level_into_the_chasm_and_bears_the_ant__B():
    env = make("AntFall")
    qpos, block = env.data.qpos, env.data.qpos[15:]
    assert drag(env, (0, 1.5), lambda: qpos[2] < 2) and 12 < qpos[1] < 20, "without a bridge"
    env.reset(seed=0)
    assert drag(env, (1.5, 0), lambda: qpos[0] > 8)
    assert drag(env, (0, 1.5), lambda: block[0] >= 7.97)
    assert drag(env, (0, -1), lambda: qpos[1] < 9)
    box = env.model.body("block").geomadr[0]
    assert abs(env.data.geom_xpos[box, 2] + 2 - 4) < 0.1  # its top
    assert np.allclose(env.data.geom_xmat[box].reshape(3, 3), np.eye(3))
    assert drag(env, (0, 1.5), lambda: qpos[1] > 26) and qpos[2] > 4, "a bridge"


def test_gather_s_walls_and_a_fresh_layout_every_episode__B():
    env = make("AntGather")
    boxes = [i for i in range(env.model.ngeom) if env.model.geom_type[i] == 6]
    found = {(*env.data.geom_xpos[i], *env.model.geom_size[i]) for i in boxes}
    wide, long = (11.5, 0.5, 1), (0.5, 11.5, 1)
    expected = {(0, -11, 1, *wide), (0, 11, 1, *wide), (-11, 0, 1, *long), (11, 0, 1, *long)}
    assert found == expected and (env.model.geom_contype[boxes] == 1).all()
    layouts = set()
    for _ in range(200):
        env.reset()
        layouts.add(tuple(map(tuple, env.objects)))
        assert env.values.tolist() == 8 * [1] + 8 * [-1]
    even = {(x, y) for x in range(-10, 10, 2) for y in range(-10, 10, 2)}
    assert len(layouts) == 200 and set().union(*layouts) == even - {(0, 0)}
    assert all(len(set(layout)) == 16 for layout in layouts)


def test_gather_readings_equal_a_brute_force_reading__B():
    env, rng = make("AntGather"), np.random.default_rng(0)
    for seed in range(40):
        env.reset(seed=seed)
        yaw, tilt = rng.uniform(-np.pi, np.pi), rng.uniform(-0.3, 0.3)
        mujoco.mju_euler2Quat(env.data.qpos[3:7], [tilt, 0.2, yaw], "XYZ")  # leans, then turns
        env.data.qpos[:2] = rng.uniform(-3, 3, 2)
        expected = np.zeros((2, 10))
        for i, place in enumerate(env.objects):
            dx, dy = place - env.data.qpos[:2]
            angle = np.angle(np.exp(1j * (np.arctan2(dy, dx) - yaw)))
            for b in range(10):
                inside = -np.pi + b * np.pi / 5 <= angle < -np.pi + (b + 1) * np.pi / 5
                if inside and np.hypot(dx, dy) <= 6:
                    expected[i // 8, b] = max(expected[i // 8, b], 1 - np.hypot(dx, dy) / 6)
        np.testing.assert_allclose(env._observation()[30:], expected.ravel(), atol=1e-6)


def test_gather_rewards_removes_and_ends__B():
    env = make("AntGather")
    env.data.qpos[2] = 0.5
    env.objects = np.array([[0, 0.99], [0.5, 0.0], [0, -0.99], [0, 1.01], [0, -1.01], [4, 3]])
    env.values = np.array([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    for place, reward, ends, distance, success in (  # distance: to the nearest apple left
        ((0, 0), 1.0, False, 1.01, False),
        ((0, 1), 1.0, False, math.sqrt(20), False),
        ((4, 3), 1.0, False, 0.0, True),
        ((0, -1), -1.0, True, 0.0, True),  # nothing is left
    ):
        env.data.qpos[:2] = place
        assert env._task_step() == (reward, ends)
        assert [env._info()[key] for key in ("distance", "is_success")] == [distance, success]
