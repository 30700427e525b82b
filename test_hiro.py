"""Tests in the paper's order; each oracle is a naive loop or a number worked out in the test."""

import copy
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.utils._python_dispatch import TorchDispatchMode

import buffers
import envs as tasks
import relabel
import train
from hiro import HIRO, PRESETS, HIROConfig, goal_transition, intrinsic_reward
from td3 import TD3

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).resolve().parent
ANT_SUBGOAL_RANGE = [10, 10, 0.5, 1, 1, 1, 1] + 4 * [0.5, 0.3]  # m, quaternion, rad (C.1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**changes):
    """An agent's configuration that learns nothing useful, quickly."""
    few = dict(hidden=16, batch_size=8, start_steps=40)
    few |= dict(low_uniform_steps=0, high_uniform_steps=0, high_random=0.0, high_relabel=1.0)
    return HIROConfig(**{**few, **changes})


# ------------------------------------------------------------ 3.2 subgoals are changes of state


def test_h_keeps_the_place_to_reach__3_2():
    states, subgoal = randn(20, 6), randn(4, seed=1)
    place = states[0, :4] + subgoal
    for state, next_state in zip(states, states[1:], strict=False):
        subgoal = goal_transition(state, subgoal, next_state)
        torch.testing.assert_close(next_state[:4] + subgoal, place)


def test_intrinsic_reward_is_the_negative_distance__eq_3():
    state, subgoal = torch.tensor([1.0, 2.0, 50.0]), torch.tensor([5.0, 6.0])
    next_state = torch.tensor([3.0, 4.0, -7.0])  # misses (6, 8) by (3, 4); the third entry is free
    assert intrinsic_reward(state, subgoal, next_state) == -5.0
    assert intrinsic_reward(state.numpy(), subgoal.numpy(), next_state.numpy()) == -5.0
    batch = intrinsic_reward(randn(7, 6), randn(7, 4, seed=1), randn(7, 6, seed=2))
    for i in range(7):
        miss = randn(7, 6)[i, :4] + randn(7, 4, seed=1)[i] - randn(7, 6, seed=2)[i, :4]
        assert math.isclose(batch[i], -math.sqrt(sum(m * m for m in miss.tolist())), rel_tol=1e-6)


# ------------------------------------------------------------ 3.3 the off-policy correction

B, K, C, D, S, A = 5, 10, 4, 3, 6, 2


def segments(seed=0):
    """states [B, c, S], actions [B, c, A], subgoal [B, d], next_state [B, S], scale [d]"""
    shapes = (B, C, S), (B, C, A), (B, D), (B, S)
    parts = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    parts[2] = parts[2].clamp(-1, 1)
    return *parts, torch.tensor([1.0, 2.0, 3.0])


def policy(state, subgoal):
    """Something smooth that depends on every state and subgoal entry."""
    mixed = state.sum(-1, keepdim=True) * 0.1 + subgoal @ torch.tensor(
        [[1.0, -1], [0.5, 2], [1, 1]]
    )
    return torch.tanh(mixed)


def test_closed_form_subgoal_sequences_equal_iterated_h__3_3():
    states, candidates = randn(B, C, S), randn(B, K, D, seed=1)
    sequences = relabel.subgoal_sequences(states, candidates)
    assert sequences.shape == (B, K, C, D)
    for b in range(B):
        for k in range(K):
            subgoal = candidates[b, k]
            for i in range(C):
                torch.testing.assert_close(sequences[b, k, i], subgoal)
                if i + 1 < C:
                    subgoal = goal_transition(states[b, i], subgoal, states[b, i + 1])


def test_candidates_are_the_original_the_difference_and_eight_random__C_3():
    states, _, subgoal, next_state, scale = segments()
    candidates = relabel.candidate_subgoals(states[:, 0], next_state, subgoal, scale)
    assert candidates.shape == (B, 10, D)
    assert torch.equal(candidates[:, 0], subgoal)
    for b in range(B):
        for j in range(D):
            change = float(next_state[b, j] - states[b, 0, j])
            limit = float(scale[j])
            assert math.isclose(candidates[b, 1, j], max(-limit, min(limit, change)), abs_tol=1e-6)


@pytest.mark.parametrize("center", [1.0, 0.5])
def test_random_candidates_have_the_right_centre_and_spread__3_3(center):
    scale = torch.tensor([10.0, 1.0])
    state, next_state = torch.zeros(1, 2), torch.tensor([[2.0, -0.2]])
    args = state, next_state, torch.zeros(1, 2), scale
    generator = torch.Generator().manual_seed(0)
    draws = relabel.candidate_subgoals(*args, 100_000, center, 0.1, generator)[0, 2:]
    torch.testing.assert_close(draws.mean(0), center * next_state[0], atol=0.01, rtol=0)
    torch.testing.assert_close(draws.std(0), 0.1 * scale, atol=0.01, rtol=0)


def test_every_candidate_is_clipped_to_the_range__C_3():
    scale = torch.tensor([1.0, 0.5])
    far = torch.tensor([[9.0, -9.0]])
    candidates = relabel.candidate_subgoals(torch.zeros(1, 2), far, 3 * scale[None], scale, 200)
    assert (candidates.abs() <= scale).all()
    assert candidates[0, 1].tolist() == [1.0, -0.5]
    assert (candidates[0, 2:].abs() == scale).any(0).all(), "the test must reach the bounds"


def test_random_candidates_are_independent_across_batch_and_dims__3_3():
    state = torch.zeros(2, 2)
    args = state, state, state, torch.full((2,), 100.0), 20_000, 1.0, 0.1
    draws = relabel.candidate_subgoals(*args, torch.Generator().manual_seed(0))[:, 2:]
    columns = draws.permute(0, 2, 1).reshape(4, -1)  # batch x dim, draws
    off_diagonal = torch.corrcoef(columns) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.03


def test_log_likelihood_is_minus_half_the_squared_error__eq_5():
    states, actions, _, _, _ = segments()
    sequences = randn(B, K, C, D, seed=9)
    mask = torch.ones(B, C)
    mask[1, 2:] = 0  # a segment that ended after two steps
    result = relabel.log_likelihood(policy, states, actions, sequences, mask)
    for b in range(B):
        for k in range(K):
            total = 0.0
            for i in range(2 if b == 1 else C):
                error = actions[b, i] - policy(states[b, i], sequences[b, k, i])
                total -= 0.5 * float((error**2).sum())
            assert math.isclose(result[b, k], total, rel_tol=1e-4)


def test_relabel_equals_a_triple_loop__3_3():
    states, actions, subgoal, next_state, scale = segments()
    chosen, index = relabel.relabel(
        policy,
        states,
        actions,
        subgoal,
        next_state,
        scale,
        generator=torch.Generator().manual_seed(5),
    )
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(B, 8, D, generator=generator)
    for b in range(B):
        change = next_state[b, :D] - states[b, 0, :D]
        candidates = [subgoal[b], change, *(change + 0.5 * scale * z for z in noise[b])]
        candidates = [torch.maximum(torch.minimum(g, scale), -scale) for g in candidates]
        scores = []
        for candidate in candidates:
            score, running = 0.0, candidate
            for i in range(C):
                score -= 0.5 * float(((actions[b, i] - policy(states[b, i], running)) ** 2).sum())
                if i + 1 < C:
                    running = goal_transition(states[b, i], running, states[b, i + 1])
            scores.append(score)
        best = int(np.argmax(scores))
        assert index[b] == best
        torch.testing.assert_close(chosen[b], candidates[best])


@pytest.mark.parametrize("true_index", [0, 1])
def test_relabel_recovers_the_subgoal_of_a_noiseless_low_policy__3_3(true_index):
    states, _, subgoal, next_state, scale = segments()
    truth = relabel.candidate_subgoals(states[:, 0], next_state, subgoal, scale)[:, true_index]
    actions = torch.zeros(B, C, A)
    for b in range(B):
        running = truth[b]
        for i in range(C):
            actions[b, i] = policy(states[b, i], running)
            if i + 1 < C:
                running = goal_transition(states[b, i], running, states[b, i + 1])
    chosen, index = relabel.relabel(policy, states, actions, subgoal, next_state, scale)
    assert (index == true_index).all()
    torch.testing.assert_close(chosen, truth)


def test_relabel_asks_the_policy_once__3_3():
    calls = []

    def counting(state, subgoal):
        calls.append(subgoal.shape)
        return policy(state, subgoal)

    relabel.relabel(counting, *segments())
    assert calls == [(B, K, C, D)]


def test_candidates_start_from_s_t_and_end_at_s_t_plus_c__3_3():
    """A segment that moves one unit a step: the difference is c, neither c - 1 nor c + 1."""
    states = torch.arange(C, dtype=torch.float32).reshape(1, C, 1)
    next_state = torch.full((1, 1), float(C))

    def walker(state, subgoal):  # one unit a step, if the goal is where the segment really ended
        return (state + subgoal == C).float()

    actions, scale = torch.ones(1, C, 1), torch.tensor([100.0])
    chosen, index = relabel.relabel(walker, states, actions, torch.zeros(1, 1), next_state, scale)
    assert chosen.item() == C and index.item() == 1


# ------------------------------------------------------------ 2.1, C.1, C.2 TD3


def learner(**changes):
    args = dict(max_action=torch.tensor([1.0, 2.0]), state_scale=torch.ones(3), hidden=8)
    args["action_scale"] = torch.ones(2)
    torch.manual_seed(0)
    return TD3(**{**args, "generator": torch.Generator().manual_seed(0), **changes})


def td3_batch(n=6, terminated=0.0):
    return {
        "state": randn(n, 3),
        "action": randn(n, 2, seed=1).clamp(-1, 1),
        "reward": randn(n, seed=2),
        "next_state": randn(n, 3, seed=3),
        "terminated": torch.full((n,), terminated),
    }


def test_target_against_a_hand_worked_number__2_1():
    td3 = learner(discount=0.5, policy_noise=0.0)
    td3.actor_target = lambda state: torch.tensor([[0.25, -1.0]])
    td3.critic_target = lambda state, action: (10 * action[:, 0], action.sum(1) + 4)  # 2.5, 3.25
    target = td3.target_q(torch.tensor([1.0]), torch.zeros(1, 3), torch.tensor([0.0]))
    assert target.item() == 1.0 + 0.5 * 2.5


def test_truncation_bootstraps_termination_does_not():
    td3, batch = learner(), td3_batch()
    reward, next_state = batch["reward"], batch["next_state"]
    assert torch.equal(td3.target_q(reward, next_state, torch.ones(6)), reward)
    assert not torch.equal(td3.target_q(reward, next_state, torch.zeros(6)), reward)


def test_target_smoothing_is_clipped_per_sample_and_stays_in_range():
    seen = []
    td3 = learner(policy_noise=torch.tensor([0.2, 0.4]), noise_clip=torch.tensor([0.5, 0.1]))
    td3.actor_target = lambda state: torch.tensor([0.8, 0.0]).expand(len(state), 2)
    td3.critic_target = lambda state, action: (seen.append(action), (action[:, 0],) * 2)[1]
    td3.target_q(torch.zeros(5000), torch.zeros(5000, 3), torch.zeros(5000))
    action = seen[0]
    assert action[:, 0].max() == 1.0 and action[:, 0].min() >= 0.8 - 0.5 - 1e-6
    assert torch.isclose(action[:, 1].abs().max(), torch.tensor(0.1))
    inside = action[:, 0][action[:, 0] < 1.0]
    assert len(inside.unique()) > 0.9 * len(inside), "every row draws its own noise"
    below = action[:, 0] < 0.8  # half a Gaussian: its mean distance is sigma * sqrt(2 / pi)
    spread = (0.8 - action[below, 0]).mean().item()
    assert math.isclose(spread, 0.2 * math.sqrt(2 / math.pi), rel_tol=0.05)


def test_actor_and_targets_move_at_every_second_update__C_2():
    td3 = learner(tau=0.25, policy_delay=2)
    for update in (1, 2, 3, 4):
        before = {
            part: [p.clone() for p in getattr(td3, part).parameters()] for part in td3.PARTS[:4]
        }
        td3.update(td3_batch())
        moved = {
            part: any(
                not torch.equal(old, new)
                for old, new in zip(before[part], getattr(td3, part).parameters(), strict=True)
            )
            for part in td3.PARTS[:4]
        }
        delayed = update % 2 == 0
        assert moved["critic"]
        assert moved["actor"] == moved["actor_target"] == moved["critic_target"] == delayed
        if delayed:
            for part in ("actor", "critic"):
                new = getattr(td3, part).parameters()
                target = getattr(td3, part + "_target").parameters()
                for old, online, now in zip(before[part + "_target"], new, target, strict=True):
                    torch.testing.assert_close(now, old + 0.25 * (online - old))


def test_critic_loss_is_the_mean_huber_loss_of_both_critics():
    td3, batch = learner(policy_noise=0.0), td3_batch(terminated=1.0)
    batch["reward"] = torch.tensor([0.1, -0.2, 3.0, -4.0, 0.5, 2.0])  # both branches of the loss
    expected = 0.0
    for q in td3.critic(batch["state"], batch["action"]):
        for value, target in zip(q.tolist(), batch["reward"].tolist(), strict=True):
            error = abs(value - target)
            expected += (0.5 * error**2 if error < 1 else error - 0.5) / 6
    assert math.isclose(td3.update(batch)["critic_loss"], expected, rel_tol=1e-4)


def test_networks_have_the_paper_s_shape_and_initialisation__C_1():
    torch.manual_seed(0)
    td3 = TD3(torch.full((8,), 30.0), torch.ones(43), torch.ones(8))
    shapes = [tuple(p.shape) for p in td3.actor.parameters()]
    assert shapes == [(300, 43), (300,), (300, 300), (300,), (8, 300), (8,)]
    for net in (td3.actor.net, td3.critic.net1, td3.critic.net2):
        bounds = [layer.in_features**-0.5 for layer in (net[0], net[2])] + [0.003]
        for layer, bound in zip((net[0], net[2], net[4]), bounds, strict=True):
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()
    assert not torch.equal(td3.critic.net1[0].weight, td3.critic.net2[0].weight)
    wild = td3.actor(1e6 * randn(100, 43))
    assert 29 < wild.abs().max() <= 30


def test_input_scales_are_units__actor_and_critic():
    """Scaled inputs to a network equal raw inputs to the same network behind the scale."""
    scale_s, scale_a = torch.tensor([0.1, 1.0, 5.0]), torch.tensor([2.0, 0.5])
    raw, scaled = learner(), learner(state_scale=scale_s, action_scale=scale_a)
    state, action = randn(4, 3), randn(4, 2, seed=1)
    torch.testing.assert_close(scaled.actor(state), raw.actor(state * scale_s))
    expected = raw.critic(state * scale_s, action * scale_a)
    torch.testing.assert_close(scaled.critic(state, action), expected)
    torch.testing.assert_close(scaled.critic.q1(state, action), expected[0])


def test_td3_solves_a_one_step_problem():
    td3 = learner(max_action=torch.ones(1), action_scale=torch.ones(1), hidden=32, actor_lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1500):
        state = 2 * torch.rand(64, 3, generator=generator) - 1
        action = 2 * torch.rand(64, 1, generator=generator) - 1
        reward = -((action - state[:, :1]) ** 2).squeeze(1)
        batch = {"state": state, "action": action, "reward": reward, "next_state": state}
        td3.update({**batch, "terminated": torch.ones(64)})
    state = 1.6 * torch.rand(200, 3, generator=generator) - 0.8
    assert (td3.act(state) - state[:, :1]).abs().mean() < 0.1


# ------------------------------------------------------------ the replay buffer


def test_buffer_wraps_and_never_returns_an_unwritten_row():
    buffer = buffers.ReplayBuffer(10, {"value": (), "pair": (2,)})
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    buffer.storage.fill_(math.nan)
    written = []
    for start in (0, 4, 8, 12):  # the third addition wraps
        values = torch.arange(start, start + 4.0)
        buffer.add(value=values, pair=torch.stack([values, -values], 1))
        written = [*written, *values.tolist()][-10:]
        batch = buffer.sample(500)
        assert set(batch["value"].tolist()) == set(written)
        assert torch.equal(batch["pair"], torch.stack([batch["value"], -batch["value"]], 1))
    assert len(buffer) == 10


def test_buffer_samples_uniformly():
    buffer = buffers.ReplayBuffer(8, {"x": ()}, generator=torch.Generator().manual_seed(0))
    buffer.add(x=torch.arange(5.0))
    counts = torch.bincount(buffer.sample(50_000)["x"].long(), minlength=5)
    assert ((counts - 10_000).abs() < 500).all()


def test_buffer_state_holds_what_was_written_and_nothing_else():
    fields = {"x": (3,), "y": (2, 2)}
    buffer = buffers.ReplayBuffer(100, fields)
    buffer.add(x=randn(7, 3), y=randn(7, 2, 2))
    state = buffer.state_dict()
    assert state["storage"].shape == (7, 7)
    copy = buffers.ReplayBuffer(100, fields)
    copy.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(buffer.rows().values(), copy.rows().values(), strict=True)
    )
    assert torch.equal(copy.rows()["y"], randn(7, 2, 2))
    with pytest.raises(ValueError, match="do not fit"):
        buffers.ReplayBuffer(100, {"x": (3,)}).load_state_dict(state)
    with pytest.raises(KeyError, match="rows have"):
        buffer.add(x=randn(1, 3))


# ------------------------------------------------------------ C.1 what the low level may see


@pytest.mark.parametrize("preset", PRESETS)
def test_low_level_is_blind_to_x_y_and_the_target__acting_and_relabelling(preset):
    config = HIROConfig(**{**PRESETS[preset], "hidden": 16})
    agent = HIRO(tasks.AntMaze, config)
    obs, subgoal = randn(4, 32), randn(4, 15, seed=1)
    elsewhere = obs.clone()
    elsewhere[:, [0, 1, 30, 31]] += 7.0
    action = agent.low_action(obs, subgoal, explore=False)
    assert torch.equal(action, agent.low_action(elsewhere, subgoal, explore=False))
    up = obs.clone()
    up[:, 2] += 0.1  # z is seen
    assert not torch.equal(action, agent.low_action(up, subgoal, explore=False))

    for network in (
        lambda state: agent.low_policy(state, subgoal).sum(),
        lambda state: agent.low.critic.q1(agent.low_input(state, subgoal), action).sum(),
    ):
        state = obs.clone().requires_grad_()
        network(state).backward()
        blind = torch.zeros(32, dtype=torch.bool)
        blind[[0, 1, 30, 31]] = True
        assert (state.grad[:, blind] == 0).all() and (state.grad[:, ~blind] != 0).any(0).all()

    states, actions = randn(2, 10, 30), randn(2, 10, 8, seed=1)
    moved = states.clone()
    moved[..., :2] += 7.0  # the same segment elsewhere in the world
    sequences = relabel.subgoal_sequences(states, randn(2, 3, 15, seed=2))
    here = relabel.log_likelihood(agent.low_policy, states, actions, sequences)
    assert torch.equal(here, relabel.log_likelihood(agent.low_policy, moved, actions, sequences))


# ------------------------------------------------------------ 3.1 who acts when, what is stored


class ClockTask(gymnasium.Env):
    """A scripted world: the state tells copy, episode and time; every copy writes a log."""

    state_dim, action_dim, low_blind = 4, 2, 2
    subgoal_scale = np.array([3.0, 5.0], np.float32)
    observation_scale = np.ones(5, np.float32)
    action_unit, total_steps, score = 1.0, 100, "success_rate"
    random_subgoals = rest_step = 0
    logs = []

    def __init__(self, evaluate=False, render_mode=None):
        self.observation_space = gymnasium.spaces.Box(-1e6, 1e6, (5,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.render_mode = render_mode
        self.log, self.episode, self.copy = [], -1, None
        if not evaluate:
            self.copy = len(ClockTask.logs)
            ClockTask.logs.append(self.log)

    def _obs(self):
        return np.array([self.time, self.time**2 / 10, self.episode, self.copy or 0, 9], np.float32)

    def _info(self):
        return {"is_success": False, "distance": 0.0, "simulator_warnings": 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return self._obs(), self._info()

    def step(self, action):
        obs = self._obs()
        self.time += 1
        reward = 1.0 + self.time
        # odd episodes terminate within a segment, even ones are cut off at a segment's end
        terminated = self.episode % 2 == 1 and self.time == 13 + (self.copy or 0)
        truncated = self.time == 20
        self.log.append((self.episode, obs, action.copy(), reward, self._obs(), terminated))
        return self._obs(), reward, terminated, truncated, self._info()

    snapshot = None


@pytest.fixture
def clock_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "Clock", ClockTask)
    gymnasium.register("hiro/Clock-v0", entry_point=ClockTask)
    yield
    gymnasium.registry.pop("hiro/Clock-v0")


@pytest.mark.parametrize("c", [5, 6], ids=["c_divides_the_episode", "c_does_not"])
@pytest.mark.parametrize("random", [False, True], ids=["policies", "uniform_start"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_both_buffers_hold_exactly_the_expected_tuples__3_1(
    clock_task, tmp_path, num_envs, random, c
):
    ClockTask.logs = []
    config = small(
        subgoal_steps=c,
        start_steps=10**6,
        low_uniform_steps=70 * random,
        high_uniform_steps=70 * random,
        low_reward_scale=0.5,
        high_reward_scale=0.1,
    )
    run = train.RunConfig(
        env="Clock", total_steps=70 * num_envs, num_envs=num_envs, eval_episodes=1
    )
    training = train.Training(run, config, tmp_path)
    training.save = lambda: None
    training.train()
    agent, logs = training.agent, ClockTask.logs
    assert len(logs) == num_envs and all(len(log) == 70 for log in logs)

    low = agent.low_buffer.rows()
    assert len(agent.low_buffer) == 70 * num_envs
    segments, subgoals = [], {}
    for t in range(70):
        for i in range(num_envs):
            row = {name: values[t * num_envs + i] for name, values in low.items()}
            episode, obs, action, _, next_obs, terminated = logs[i][t]
            time = int(obs[0])
            assert row["state"].tolist() == obs[:4].tolist()
            assert row["next_state"].tolist() == next_obs[:4].tolist()
            np.testing.assert_array_equal(row["action"], action)
            assert row["terminated"] == terminated
            miss = obs[:2] + row["subgoal"].numpy() - next_obs[:2]
            assert math.isclose(row["reward"], -0.5 * np.linalg.norm(miss), rel_tol=1e-5)
            if time % c:  # between two decisions of the high level the stored g_{t+1} is used
                assert torch.equal(row["subgoal"], subgoals[i])
            else:
                assert subgoals.get(i) is None or not torch.equal(row["subgoal"], subgoals[i])
            torch.testing.assert_close(row["next_subgoal"], torch.from_numpy(miss))  # h
            subgoals[i] = row["next_subgoal"]

            if time % c == 0:
                segments.append({"env": i, "first": obs, "subgoal": row["subgoal"], "steps": []})
            current = next(s for s in reversed(segments) if s["env"] == i)
            current["steps"].append(logs[i][t])
            current["end"] = t, i

    # full, terminated, or cut off at time 20
    complete = [
        s
        for s in segments
        if len(s["steps"]) == c or s["steps"][-1][5] or s["steps"][-1][4][0] == 20
    ]
    complete.sort(key=lambda s: s["end"])
    high = agent.high_buffer.rows()
    assert len(agent.high_buffer) == len(complete)
    lengths = set()
    for j, segment in enumerate(complete):
        row = {name: values[j] for name, values in high.items()}
        steps = segment["steps"]
        n = len(steps)
        lengths.add(n)
        assert row["state"].tolist() == segment["first"].tolist()
        assert torch.equal(row["subgoal"], segment["subgoal"])
        assert row["mask"].tolist() == [1.0] * n + [0.0] * (c - n)
        assert row["states"][:n].tolist() == [step[1][:4].tolist() for step in steps]
        np.testing.assert_array_equal(row["actions"][:n], [step[2] for step in steps])
        assert (row["states"][n:] == 0).all() and (row["actions"][n:] == 0).all()
        assert math.isclose(row["reward"], 0.1 * sum(step[3] for step in steps), rel_tol=1e-6)
        assert row["next_state"].tolist() == steps[-1][4].tolist()
        assert row["terminated"] == steps[-1][5]
    assert lengths > {c}, "some segments must be short"


def test_actions_follow_the_stored_subgoal_and_subgoals_the_state_they_are_set_in__3_1(
    clock_task, tmp_path
):
    """Without noise every stored action and subgoal is the policy's own answer."""
    ClockTask.logs = []
    config = small(subgoal_steps=5, start_steps=10**6, low_noise=0.0)
    config.high_noise = 0.0
    run = train.RunConfig(env="Clock", total_steps=120, num_envs=2, eval_episodes=1)
    training = train.Training(run, config, tmp_path)
    training.save = lambda: None
    with torch.no_grad():  # fresh actors answer about 0 to everything
        for level in (training.agent.low, training.agent.high):
            for p in level.actor.parameters():
                p.copy_(0.3 * randn(*p.shape, seed=3))
    training.train()
    agent = training.agent
    low, high = agent.low_buffer.rows(), agent.high_buffer.rows()
    answer = agent.low_action(low["state"], low["subgoal"], explore=False)
    torch.testing.assert_close(low["action"], answer)
    elsewhere = agent.low_action(low["state"], 0 * low["subgoal"], explore=False)
    assert not torch.allclose(low["action"], elsewhere)
    torch.testing.assert_close(high["subgoal"], agent.high_action(high["state"], explore=False))
    assert len(high["subgoal"].unique(dim=0)) > len(high["subgoal"]) // 4


def test_low_update_pairs_next_state_with_next_subgoal__3_1():
    agent = HIRO(tasks.PointMaze, small(low_relabel=0.0))
    fields = enumerate(agent.low_buffer.fields.items())
    rows = {name: randn(50, *shape, seed=i) for i, (name, shape) in fields}
    agent.low_buffer.add(**rows)
    seen = []
    agent.low.update = lambda batch: seen.append(batch) or {}
    agent.update_low()
    batch = seen[0]
    row = (rows["reward"][None] == batch["reward"][:, None]).int().argmax(1)
    for state, subgoal in (("state", "subgoal"), ("next_state", "next_subgoal")):
        expected = torch.cat([rows[state][row][:, 2:], rows[subgoal][row]], 1)
        assert torch.equal(batch[state], expected)
    for name in ("action", "terminated"):
        assert torch.equal(batch[name], rows[name][row])


def test_a_share_of_low_samples_gets_another_one_s_subgoal__5_2():
    agent = HIRO(tasks.PointMaze, small(low_relabel=0.3, low_reward_scale=2.0))
    fields = enumerate(agent.low_buffer.fields.items())
    before = {name: randn(10, *shape, seed=i) for i, (name, shape) in fields}
    batch = {name: part.clone() for name, part in before.items()}
    agent.swap_subgoals(batch)
    for i in range(10):
        expected = {name: part[i] for name, part in before.items()}
        if i < 3:
            g, s, after = before["subgoal"][i - 1], before["state"][i, :2], before["next_state"][i]
            left = [float(s[k] + g[k] - after[k]) for k in range(2)]
            expected["subgoal"] = g
            expected["reward"] = torch.tensor(-2.0 * math.hypot(*left))
            expected["next_subgoal"] = torch.tensor(left)
        for name, value in expected.items():
            torch.testing.assert_close(batch[name][i], value)


def test_correction_ignores_what_lies_behind_a_short_segment__3_3():
    agent = HIRO(tasks.PointMaze, small())
    with torch.no_grad():
        for p in agent.low.actor.parameters():
            p.copy_(0.3 * randn(*p.shape, seed=3))
    batch = {name: randn(64, *shape) for name, shape in agent.high_buffer.fields.items()}
    batch["mask"] = (torch.arange(10) < 3).float().expand(64, 10)
    index = []
    for actions in (batch["actions"], batch["actions"] * batch["mask"][..., None]):
        agent.generator.manual_seed(0)
        index.append(agent.correct({**batch, "actions": actions})[1])
    assert torch.equal(*index) and len(index[0].unique()) > 3


def test_each_level_gets_its_own_hyperparameters__C_2():
    config = HIROConfig(
        **dict(low_discount=0.1, high_discount=0.2, low_tau=0.3, high_tau=0.4),
        **dict(low_actor_lr=1.0, low_critic_lr=2.0, high_actor_lr=3.0, high_critic_lr=4.0),
        **dict(policy_delay=5, hidden=8),
    )
    agent = HIRO(tasks.AntMaze, config)
    for level, discount, tau, actor_lr, critic_lr in (
        (agent.low, 0.1, 0.3, 1.0, 2.0),
        (agent.high, 0.2, 0.4, 3.0, 4.0),
    ):
        assert (level.discount, level.tau, level.policy_delay) == (discount, tau, 5)
        assert level.actor_optimizer.param_groups[0]["lr"] == actor_lr
        assert level.critic_optimizer.param_groups[0]["lr"] == critic_lr


def test_uniform_start_fills_both_ranges():
    agent = HIRO(tasks.AntMaze, small(low_uniform_steps=1, high_uniform_steps=1))
    obs = torch.zeros(20_000, 32)
    for draw, scale in (
        (agent.low_action(obs, torch.zeros(20_000, 15), explore=True), torch.ones(8)),
        (agent.high_action(obs, explore=True), agent.subgoal_scale),
    ):
        assert (draw.abs() <= scale).all()
        quartiles = torch.quantile(draw / scale, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        expected = torch.tensor([-0.5, 0.0, 0.5])[:, None].expand_as(quartiles)
        torch.testing.assert_close(quartiles, expected, atol=0.03, rtol=0)
    fixed = agent.low_action(obs, torch.zeros(20_000, 15), explore=False)
    assert (fixed == fixed[0]).all(), "evaluation is never random"
    agent.steps = 1
    assert agent.low_action(obs, torch.zeros(20_000, 15), explore=True).std() < 0.3


def test_a_share_of_subgoals_stays_uniformly_random():
    agent = HIRO(tasks.PointMaze, small(high_random=0.3, high_noise=0.0))
    obs = randn(20_000, len(tasks.PointMaze.observation_scale))
    subgoal, own = agent.high_action(obs, explore=True), agent.high.act(obs)
    random = (subgoal != own).all(1)
    assert abs(random.float().mean() - 0.3) < 0.02
    assert torch.equal(subgoal[~random], own[~random])
    spread = (subgoal[random] / agent.subgoal_scale).std(0)
    torch.testing.assert_close(spread, torch.full_like(spread, 3**-0.5), atol=0.02, rtol=0)
    assert torch.equal(agent.high_action(obs, explore=False), own)


def test_loading_a_policy_leaves_the_task_s_ranges_alone():
    before = tasks.PointMaze.subgoal_scale.copy()
    agent = HIRO(tasks.PointMaze, small())
    policy = agent.policy_dict()
    policy["high"]["max_action"] *= 2
    agent.load_policy_dict(policy)
    assert np.array_equal(tasks.PointMaze.subgoal_scale, before)


def test_a_loaded_state_stays_the_caller_s():
    agent, other = (HIRO(tasks.PointMaze, small(), seed=k) for k in range(2))

    def train_a_little(agent):
        rows = {name: randn(8, *s) for name, s in agent.low_buffer.fields.items()}
        agent.low_buffer.add(**rows)
        obs = randn(1, len(tasks.PointMaze.observation_scale))
        zero = np.zeros(1)
        agent.observe(obs, agent.act(obs), zero, obs, zero, zero)
        agent.update_low()

    train_a_little(agent)
    state = agent.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    train_a_little(other)
    assert_same(before, state)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluation_leaves_training_untouched__C_4(tmp_path, num_envs):
    run = train.RunConfig(env="PointMaze", total_steps=90, num_envs=num_envs, eval_episodes=2)
    training = train.Training(run, small(), tmp_path)
    training.train()

    def everything():
        state = copy.deepcopy(training.agent.state_dict())  # weights are live views
        return [state, training.envs.get_attr("snapshot"), training.obs.copy()]

    before = everything()
    first = train.evaluate(training.agent, training.eval_envs, 2, seed=7)
    assert_same(before, everything())
    assert train.evaluate(training.agent, training.eval_envs, 2, seed=7) == first


def assert_same(a, b, path=""):
    """Bit-identical nested dicts, lists, tensors and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor | np.ndarray):
        assert a.shape == b.shape, path
        assert np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True), path
    else:
        assert a == b or (a != a and b != b), path


def test_more_episodes_than_copies_and_copies_that_end_early__C_4(monkeypatch):
    """Two copies, three episodes; the ball of copy 0 dies early, and its numbers stop there."""
    run = train.RunConfig(env="PointMaze")
    agent = HIRO(tasks.PointMaze, small())
    envs = train.make_envs(run, 2, evaluate=True)
    points = [env.unwrapped for env in envs.envs]
    for point in points:
        point.max_steps = 7
    monkeypatch.setattr(points[0], "_task_step", lambda: (-1.0, points[0].steps == 4))
    monkeypatch.setattr(points[1], "_task_step", lambda: (-1.0, False))
    seeds = []
    reset = points[0].reset
    monkeypatch.setattr(points[0], "reset", lambda **kw: seeds.append(kw["seed"]) or reset(**kw))
    results = train.rollouts(agent, envs, 3, seed=5)
    assert [(r["steps"], r["return"]) for r in results] == [(4, -4.0), (7, -7.0), (4, -4.0)]
    assert [seed for seed in seeds if seed is not None] == [5, 7]


def test_evaluation_counts_success_at_the_last_step_only__C_4(monkeypatch, tmp_path):
    """A point that passes through the target and leaves it again has not succeeded."""
    run = train.RunConfig(env="PointMaze", eval_episodes=1)
    agent = HIRO(tasks.PointMaze, small())
    envs = train.make_envs(run, 1, evaluate=True)
    point = envs.envs[0].unwrapped
    for last_distance, success in ((4.9, 1.0), (5.1, 0.0)):
        plan = iter([20.0, 1.0, last_distance])  # metres from the target at each step
        point.max_steps = 3
        monkeypatch.setattr(point, "_task_step", lambda plan=plan: place(point, next(plan)))
        result = train.evaluate(agent, envs, 1, seed=0)
        assert result["success_rate"] == success
        assert math.isclose(result["distance"], last_distance, rel_tol=1e-6)
        assert math.isclose(result["return"], -20 - 1 - last_distance, rel_tol=1e-6)


def place(point, distance):
    point.data.qpos[:2] = point.target + [distance, 0]
    return -distance, False


def test_evaluation_asks_the_high_level_every_c_steps_without_noise__C_4(tmp_path):
    run = train.RunConfig(env="PointMaze")
    agent = HIRO(tasks.PointMaze, small(subgoal_steps=10))
    calls = []
    original = agent.high_action

    def counting(obs, explore):
        calls.append(explore)
        return original(obs, explore)

    agent.high_action = counting
    train.evaluate(agent, train.make_envs(run, 2, evaluate=True), 2, seed=0)
    assert calls == [False] * 30  # at t = 0, 10, ..., 290


def test_gradient_steps_follow_environment_steps__C_2(tmp_path):
    for num_envs, update_every, low, high in ((1, 1, 100, 10), (4, 1, 100, 10), (4, 2, 50, 5)):
        run = train.RunConfig(env="PointMaze", total_steps=140, num_envs=num_envs, eval_episodes=1)
        config = small(start_steps=40, update_every=update_every)
        training = train.Training(run, config, tmp_path)
        training.train()
        assert (training.agent.low.updates, training.agent.high.updates) == (low, high)


def test_the_high_level_learns_from_when_its_subgoals_are_its_own(tmp_path):
    run = train.RunConfig(env="PointMaze", total_steps=140, eval_episodes=1)
    training = train.Training(run, small(start_steps=40, high_uniform_steps=90), tmp_path)
    training.train()
    assert (training.agent.low.updates, training.agent.high.updates) == (100, 5)


def test_at_last_the_low_level_rests_and_the_high_level_asks_for_less(tmp_path):
    run = train.RunConfig(env="AntMaze", total_steps=140, eval_episodes=1)
    config = small(start_steps=40, rest_step=100, rest_reach=0.25, high_noise=1.0)
    training = train.Training(run, config, tmp_path)
    agent, full = training.agent, torch.tensor(ANT_SUBGOAL_RANGE)
    while training.step < 100:
        training.interact()
    assert not agent.low_rests and (agent.low.updates, agent.high.updates) == (60, 6)
    weights = copy.deepcopy(agent.low.state_dict())
    while training.step < 140:
        training.interact()
    assert agent.low_rests and (agent.low.updates, agent.high.updates) == (60, 10)
    assert_same(agent.low.state_dict(), weights)

    near = torch.cat([0.25 * full[:2], full[2:]])  # x and y only, which the low level never sees
    rows = agent.high_buffer.rows()
    before, after = rows["subgoal"][:11], rows["subgoal"][11:]  # segments begin at 0 ... 100, 110
    assert (before.abs() > near).any() and (before.abs() <= full).all()
    assert (after.abs() <= near).all() and (after.abs() == near)[:, :2].any()
    for actor in agent.high.actor, agent.high.actor_target:
        assert torch.equal(actor.max_action, near)
    for noise, fraction in (
        (agent.high_noise, 1.0),
        (agent.high.policy_noise, 0.2),
        (agent.high.noise_clip, 0.5),
    ):
        torch.testing.assert_close(noise, fraction * near)
    inverse = agent.high.critic.scale[-15:]
    torch.testing.assert_close(inverse, 1 / full)  # what old subgoals mean to networks stays
    assert (agent.high_action(randn(500, 32), explore=True).abs() <= near).all()

    agent.bfloat16 = False
    batch = {name: part[:11] for name, part in rows.items()}
    args = [batch[name] for name in ("states", "actions", "subgoal", "next_state")]
    generator = agent.generator.clone_state()
    expected = relabel.relabel(agent.low_policy, *args, near, batch["mask"], generator=generator)
    assert_same(agent.correct(batch), expected)

    policy = HIRO(tasks.AntMaze, small())  # the reach comes with the policy
    policy.load_policy_dict(agent.policy_dict())
    assert torch.equal(policy.high.max_action, near)
    other = HIRO(tasks.AntMaze, config, seed=1)  # and with a checkpoint, noise too; and it goes
    early = {**other.state_dict(), "steps": 100}
    for state, reach in ((agent.state_dict(), near), (early, full)):
        other.load_state_dict(state)
        assert torch.equal(other.high.max_action, reach) and torch.equal(other.high_noise, reach)


def test_only_AntMaze_s_low_level_rests_and_the_paper_s_never():
    steps = {"AntMaze": 1_000_000, "AntPush": 0, "AntFall": 0, "AntGather": 0, "PointMaze": 0}
    assert steps.keys() == tasks.TASKS.keys()
    for preset, task in itertools.product(PRESETS, steps):
        config = train.configs({"env": task, "preset": preset})[1]
        expected = steps[task] if preset == "td3" else 0
        assert config.rest_step == expected
        agent = HIRO(tasks.TASKS[task], dataclasses.replace(config, hidden=8))
        for agent.steps in (1_000_000, 1_000_001, 10**7):
            assert agent.low_rests == (expected > 0 and agent.steps > expected)
    chosen = train.configs({"env": "AntMaze", "rest_step": 0, "high_uniform_steps": 20_000})[1]
    assert (chosen.rest_step, chosen.high_uniform_steps) == (0, 20_000)


def test_correction_uses_the_current_low_level_and_keeps_the_rest__3_3():
    agent = HIRO(tasks.PointMaze, small())
    agent.bfloat16 = False
    rows = {name: randn(64, *shape) for name, shape in agent.high_buffer.fields.items()}
    rows["mask"], rows["terminated"] = torch.ones(64, 10), (rows["reward"] > 0).float()
    agent.high_buffer.add(**rows)
    seen = []
    agent.high.update = lambda batch: seen.append(batch) or {}
    generator = agent.generator.clone_state()
    agent.update_high()
    stored = agent.high_buffer.rows()
    assert_same(stored, {name: rows[name] for name in stored})  # nothing is written back

    def rows_of(batch):
        return (stored["state"][None] == batch["state"][:, None]).all(-1).int().argmax(1)

    def relabelled(rows):
        """These rows' subgoals, corrected by relabel alone; was any replaced?"""
        torch.randint(64, (8,), generator=generator)  # the rows of the batch were drawn first
        names = ("states", "actions", "subgoal", "next_state")
        args = [stored[name][rows] for name in names]
        scale = agent.subgoal_scale
        subgoal, index = relabel.relabel(agent.low_policy, *args, scale, generator=generator)
        return subgoal, index.any()

    batch = seen[0]
    row = rows_of(batch)
    for name in ("reward", "next_state", "states", "actions", "terminated"):
        assert torch.equal(batch[name], stored[name][row])
    expected, replaced = relabelled(row)
    assert torch.equal(batch["action"], expected) and replaced

    chosen = []
    for _ in range(2):
        agent.generator.manual_seed(3)
        chosen.append(agent.correct(stored)[1])
        with torch.no_grad():  # another low level makes other candidates likely
            for p in agent.low.actor.parameters():
                p.copy_(randn(*p.shape, seed=11))
    assert not torch.equal(*chosen)

    agent.config.high_relabel = 0.3
    generator = agent.generator.clone_state()
    agent.update_high()
    row = rows_of(seen[1])
    expected, replaced = relabelled(row[:2])  # .3 of 8, rounded
    assert torch.equal(seen[1]["action"][:2], expected) and replaced
    assert torch.equal(seen[1]["action"][2:], stored["subgoal"][row[2:]])

    agent.config.correction = False
    agent.update_high()
    assert torch.equal(seen[2]["action"], stored["subgoal"][rows_of(seen[2])])


def test_updates_never_wait_for_the_device():
    """No update reads a number back, or makes a tensor whose size depends on one."""
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    by_index = torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default
    ran, waited = set(), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            ran.add(operator)
            if operator in by_index:  # whole numbers give a known size
                if any(i is not None and i.dtype == torch.bool for i in args[1]):
                    waited.add(operator)
            elif waits & set(operator.tags):
                waited.add(operator)
            return operator(*args, **(kwargs or {}))

    agent = HIRO(tasks.PointMaze, small())
    for buffer in (agent.low_buffer, agent.high_buffer):
        buffer.add(**{name: randn(8, *shape) for name, shape in buffer.fields.items()})
    with Watch():
        for _ in range(agent.low.policy_delay):
            agent.update_low()
            agent.update_high()
    assert torch.ops.aten._fused_adam_.default in ran and not waited
    with Watch():  # what would be found
        torch.ones(2).sum().item()
        torch.bincount(torch.ones(2, dtype=torch.long))
        torch.ones(2)[torch.ones(2) > 0]
        torch.ones(2)[torch.ones(2) > 0] = 0
    assert len(waited) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_updates_never_wait_for_a_real_device():
    agent = HIRO(tasks.PointMaze, small(), device="cuda")
    for buffer in (agent.low_buffer, agent.high_buffer):
        buffer.add(**{name: randn(8, *shape) for name, shape in buffer.fields.items()})
    for mode in ("default", "error"):  # the first updates set up what later ones use
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for _ in range(agent.low.policy_delay):
                agent.update_low()
                agent.update_high()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_changes_almost_no_choice__3_3():
    agent = HIRO(tasks.AntMaze, HIROConfig())
    torch.manual_seed(0)
    for p in agent.low.actor.parameters():  # a policy that reacts, unlike a fresh one
        p.data += 0.05 * torch.randn_like(p)
    states = torch.cumsum(0.2 * torch.randn(300, 11, 30), 1)
    goal = (states[:, 10, :15] - states[:, 0, :15]).clamp(-agent.subgoal_scale, agent.subgoal_scale)
    actions = agent.low_policy(
        states[:, :10], relabel.subgoal_sequences(states[:, :10], goal[:, None])[:, 0]
    )
    batch = {
        "states": states[:, :10],
        "actions": (actions + 0.2 * torch.randn_like(actions)).clamp(-1, 1).detach(),
        "subgoal": agent.subgoal_scale * (2 * torch.rand(300, 15) - 1),
        "next_state": states[:, 10],
        "mask": torch.ones(300, 10),
    }
    agent.bfloat16 = True
    agent.generator.manual_seed(1)
    _, fast = agent.correct(batch)
    agent.generator.manual_seed(1)
    args = batch["states"], batch["actions"], batch["subgoal"], batch["next_state"]
    _, exact = relabel.relabel(
        agent.low_policy, *args, agent.subgoal_scale, generator=agent.generator
    )
    assert len(exact.unique()) > 3
    assert (fast != exact).float().mean() < 0.02


def test_exploration_noise_is_clipped_and_has_the_stated_scale__C_2():
    for preset, low, high in (
        ("td3", 0.2, 0.2 * tasks.AntMaze.subgoal_scale),
        ("paper", 1 / 30, 1),
    ):
        changes = {"hidden": 8, "high_random": 0.0}
        agent = HIRO(tasks.AntMaze, HIROConfig(**{**PRESETS[preset], **changes}))
        agent.steps = 10**6
        obs = torch.zeros(20_000, 32)
        action = agent.low_action(obs, torch.zeros(20_000, 15), explore=True)
        torch.testing.assert_close(action.std(0), torch.full((8,), low), rtol=0.05, atol=0)
        subgoal, scale = agent.high_action(obs, explore=True), agent.subgoal_scale
        assert (subgoal.abs() <= scale).all()
        expected = torch.as_tensor(high * np.ones(15), dtype=torch.float32)
        wide = scale > 4 * expected  # where clipping does not matter
        assert wide[:2].all()
        torch.testing.assert_close(subgoal.std(0)[wide], expected[wide], rtol=0.05, atol=0)


# ------------------------------------------------------------ appendix B, the tasks


def make(name, **kwargs):
    return gymnasium.make(f"hiro/{name}-v0", **kwargs).unwrapped


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.filterwarnings("error")
def test_gymnasium_s_checker_has_nothing_to_say(name):
    env = make(name)
    check_env(env, skip_render_check=True)
    assert env.observation_space.shape == (len(env.observation_scale),)
    assert len(env.subgoal_scale) <= env.state_dim <= len(env.observation_scale)


@pytest.fixture(scope="session")
def off_screen():
    """Skips where OpenGL cannot draw without a screen."""
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    env = {**os.environ, "MUJOCO_GL": "egl"}
    if subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).returncode:
        pytest.skip("no off-screen OpenGL on this machine")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_rgb_array_shows_the_scene(name, off_screen):
    env = make(name, render_mode="rgb_array", width=120, height=90)
    env.reset(seed=0)
    image = env.render()
    assert image.shape == (90, 120, 3) and image.dtype == np.uint8
    assert image.std() > 10
    env.close()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_an_episode_is_truncated_at_its_last_step_and_info_is_complete(name):
    env = make(name)
    env.reset(seed=0)
    for step in range(1, env.max_steps + 1):
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_dim))
        assert not terminated and truncated == (step == env.max_steps)
        assert {"is_success", "distance", "simulator_warnings"} <= info.keys()
        if name != "AntGather":
            assert reward == -info["distance"]
            assert info["is_success"] == (info["distance"] < 5)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_seeded_reset_is_reproducible_and_state_is_complete(name):
    first, second = make(name), make(name)
    assert np.array_equal(first.reset(seed=3)[0], second.reset(seed=3)[0])
    assert not np.array_equal(first.reset(seed=4)[0], first.reset(seed=5)[0])
    rng = np.random.default_rng(0)

    def play(env, actions):
        for action in actions:
            *result, info = env.step(action)
            trace.append([*result, info])
        trace.append(env.reset()[0])  # the random generator is part of the state

    actions = rng.uniform(-1, 1, (60, first.action_dim))
    for action in actions[:30]:
        first.step(action)
    state = first.get_state()
    second.reset(seed=99)
    second.set_state(state)
    trace = []
    play(first, actions[30:])
    expected, trace = trace, []
    play(second, actions[30:])
    assert_same(expected, trace)
    assert_same(make_after(name, state), expected)


def make_after(name, state):
    """The same continuation from a saved state that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    env = make(name)
    env.reset(seed=1)
    env.set_state(torch.load(file, weights_only=True))
    actions = np.random.default_rng(0).uniform(-1, 1, (60, env.action_dim))[30:]
    trace = []
    for action in actions:
        *result, info = env.step(action)
        trace.append([*result, info])
    return [*trace, env.reset()[0]]


def test_training_and_evaluation_targets__B():
    maze = make("AntMaze")
    targets = np.array([maze.reset(seed=i)[0][30:] for i in range(300)])
    assert targets.min() >= -4 and targets.max() <= 20
    assert np.allclose(targets.mean(0), 8, atol=1.2) and np.allclose(
        targets.std(0), 24 / 12**0.5, atol=1
    )
    for name, target in (("AntMaze", (0, 16)), ("AntPush", (0, 19)), ("AntFall", (0, 27, 4.5))):
        for seed in range(3):
            assert np.array_equal(make(name, evaluate=True).reset(seed=seed)[0][30:], target)
    for name, target in (("AntPush", (0, 19)), ("AntFall", (0, 27, 4.5))):
        assert np.array_equal(make(name).reset(seed=1)[0][30:], target)


def test_the_state_is_positions_velocities_and_scaled_time__B():
    for name in ("AntMaze", "AntPush", "AntFall", "AntGather"):
        env = make(name)
        env.reset(seed=0)
        for _ in range(7):
            obs, *_ = env.step(np.full(8, 0.5))
        expected = [*env.data.qpos[:15], *env.data.qvel[:14], 0.001 * 7]
        np.testing.assert_allclose(obs[:30], expected, rtol=1e-6)


def test_a_reset_scatters_every_joint__B():
    env = make("AntPush")
    obs = np.array([env.reset(seed=seed)[0] for seed in range(500)])
    position, velocity = obs[:, :15] - env.model.qpos0[:15], obs[:, 15:29]
    assert np.abs(position).max() <= 0.1 + 1e-6  # uniform
    np.testing.assert_allclose(position.std(0), 0.1 / 3**0.5, rtol=0.1)
    np.testing.assert_allclose(velocity.std(0), 0.1, rtol=0.15)  # normal
    assert np.abs(position.mean(0)).max() < 0.015 and np.abs(velocity.mean(0)).max() < 0.025
    assert np.abs(velocity).max() > 0.25


def test_the_ant_is_rllab_s__B():
    for name in ("AntMaze", "AntPush", "AntFall", "AntGather"):
        env = make(name)
        model = env.model
        ant = [model.geom(i).id for i in range(model.ngeom) if model.geom(i).name.endswith("_geom")]
        mass = model.body_mass[1:].sum() - sum(
            model.body(i).mass[0] for i in range(model.nbody) if model.body(i).name == "block"
        )
        assert math.isclose(mass, 0.91088, abs_tol=5e-6)
        assert math.isclose(model.body("torso").mass[0], 0.32725, abs_tol=5e-6)
        blocks = 2 * (name in ("AntPush", "AntFall"))
        assert (model.nq, model.nv, model.nu) == (15 + blocks, 14 + blocks, 8)
        assert model.opt.timestep == 0.02 and model.opt.integrator == 1 and env.frame_skip == 5
        assert (model.actuator_gear[:, 0] == 1).all()
        assert (model.actuator_ctrlrange == [-30, 30]).all()
        order = [model.joint(int(j)).name for j in model.actuator_trnid[:, 0]]
        assert order == [f"{part}_{leg}" for leg in (4, 1, 2, 3) for part in ("hip", "ankle")]
        assert (model.dof_armature[6:14] == 1).all() and (model.dof_damping[6:14] == 1).all()
        degrees = np.rad2deg(model.jnt_range[1:9]).round(6).tolist()
        hip, up, down = [-30, 30], [30, 70], [-70, -30]
        assert degrees == [hip, up, hip, down, hip, down, hip, up]
        assert (model.geom_condim == 3).all() and np.allclose(model.geom_solref, [0.02, 1])
        assert np.allclose(model.geom_conaffinity[model.geom("floor").id], 1)
        assert (model.dof_armature[:6] == 0).all() and (model.dof_damping[:6] == 0).all()
        assert (model.dof_armature[14:] == 0).all() and (model.dof_damping[14:] == 0).all()
        hard = 0.995 if blocks else 0.8
        assert np.allclose(model.geom_solimp[:, :3], [hard, hard, 0.01])
        assert np.allclose(model.geom_margin, 0.005)
        assert np.allclose(model.geom_friction, [1, 0.5, 0.5])
        assert (model.geom_conaffinity[ant] == 0).all() and len(ant) == 13
        others = [i for i in range(model.ngeom) if i not in ant]
        assert (model.geom_conaffinity[others] == 1).all()
        env.reset(seed=0)
        env.step(np.full(8, 0.5))
        assert (env.data.ctrl == 15).all()


def test_ant_sinks_as_with_the_original_contacts__B():
    """Contact margins, seen from outside: 5 s after a fall without torque the height is .520."""
    env = make("AntMaze")
    heights = []
    for margin in (0.005, 0.01):  # .01 a geom is what rllab's file would mean to MuJoCo >= 3.5
        env.model.geom_margin[:] = margin
        env.reset(seed=0)
        env.data.qpos[:], env.data.qvel[:] = env.model.qpos0, 0
        for _ in range(50):
            env.step(np.zeros(8))
        heights.append(env.data.qpos[2])
        ankles = env.data.qpos[[8, 10, 12, 14]]
    assert np.allclose(heights, [0.520, 0.551], atol=0.002)
    assert np.allclose(ankles, ankles[0] * np.array([1, -1, -1, 1]), atol=1e-3)


@pytest.mark.parametrize(
    "name, walls, platforms",
    [
        ("AntMaze", ["#####", "#R..#", "###.#", "#...#", "#####"], False),
        ("AntPush", ["#####", "#.R##", "#.B.#", "##.##", "#####"], False),
        ("AntFall", ["####", "#R.#", "#.Z#", "#~~#", "#..#", "####"], True),
    ],
)
def test_layout__B(name, walls, platforms):
    env = make(name)
    env.reset(seed=0)
    model, column = env.model, next(row.index("R") for row in walls if "R" in row)
    expected = set()
    for i, row in enumerate(walls, -1):
        for j, cell in enumerate(row):
            x, y = 8 * (j - column), 8 * i
            if platforms and cell != "~":
                expected.add((x, y, 2, 4, 4, 2))
            if cell == "#":
                expected.add((x, y, 6 if platforms else 2, 4, 4, 2))
            if cell == "B":
                expected.add((x, y, 2, 4, 4, 2))
            if cell == "Z":
                expected.add((x, y, 6, 3.96, 3.96, 2))
    boxes = [i for i in range(model.ngeom) if model.geom_type[i] == 6]
    found = [(*env.data.geom_xpos[i], *model.geom_size[i]) for i in boxes]
    assert {tuple(np.round(box, 6)) for box in found} == expected and len(found) == len(expected)
    assert (model.geom_contype[boxes] == 1).all() and (model.geom_conaffinity[boxes] == 1).all()
    assert math.isclose(model.qpos0[2], 4.75 if platforms else 0.75)
    if name == "AntPush":
        assert math.isclose(model.body("block").mass[0], 0.0002)
        assert [model.joint(j).limited[0] for j in ("block_x", "block_y")] == [0, 0]
        assert np.array_equal(model.jnt_axis[-2:], [[1, 0, 0], [0, 1, 0]])
    if name == "AntFall":
        assert math.isclose(model.body("block").mass[0], 0.001)
        assert np.array_equal(model.jnt_range[-2:], [[-8, 8], [-4, 0]])
        assert np.array_equal(model.jnt_axis[-2:], [[0, 1, 0], [0, 0, 1]])
    if name in ("AntPush", "AntFall"):
        assert np.allclose(model.jnt_margin[-2:], 0.01)
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


def test_push_block_can_be_pushed_aside__B():
    env = make("AntPush")
    env.reset(seed=0)
    block = env.data.qpos[15:]
    assert drag(env, (-1.5, 0), lambda: env.data.qpos[0] < -6)
    assert drag(env, (0, 1.5), lambda: env.data.qpos[1] > 7.5)
    assert drag(env, (1.5, 0), lambda: block[0] > 7.9), "the block gives way"
    assert abs(block[1]) < 0.05
    assert drag(env, (-1, 0), lambda: env.data.qpos[0] < 0.5) and block[0] > 7.5
    assert drag(env, (0, 1.5), lambda: env._info()["is_success"]), "the way is open"


def test_pushing_straight_ahead_blocks_the_way__B():
    env = make("AntPush")
    env.reset(seed=0)
    assert not drag(env, (0, 1.5), lambda: env._info()["is_success"])


def test_fall_block_drops_level_into_the_chasm_and_bears_the_ant__B():
    env = make("AntFall")
    env.reset(seed=0)
    qpos, block = env.data.qpos, env.data.qpos[15:]
    assert drag(env, (1.5, 0), lambda: qpos[0] > 8)
    assert drag(env, (0, 1.5), lambda: block[0] >= 7.97)
    assert drag(env, (0, -1), lambda: qpos[1] < 9)
    box = env.model.body("block").geomadr[0]
    top = env.data.geom_xpos[box, 2] + 2
    assert abs(top - 4) < 0.1
    assert np.allclose(env.data.geom_xmat[box].reshape(3, 3), np.eye(3))
    assert drag(env, (0, 1.5), lambda: qpos[1] > 26) and qpos[2] > 4, "a bridge"


def test_without_the_bridge_the_ant_falls__B():
    env = make("AntFall")
    env.reset(seed=0)
    assert drag(env, (0, 1.5), lambda: env.data.qpos[2] < 2)
    assert 12 < env.data.qpos[1] < 20


def test_gather_readings_equal_a_brute_force_reading__B():
    env = make("AntGather")
    rng = np.random.default_rng(0)
    for seed in range(40):
        env.reset(seed=seed)
        assert len({tuple(place) for place in env.objects}) == 16
        assert (env.objects % 2 == 0).all() and env.objects.min() >= -10 and env.objects.max() <= 8
        assert not (env.objects == 0).all(1).any()
        yaw, tilt = rng.uniform(-np.pi, np.pi), rng.uniform(-0.3, 0.3)
        quat = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        lean = np.array([np.cos(tilt / 2), np.sin(tilt / 2), 0, 0])  # about the torso's own x axis
        w = quat[0] * lean[0], quat[0] * lean[1], quat[3] * lean[1], quat[3] * lean[0]
        env.data.qpos[3:7] = w
        env.data.qpos[:2] = rng.uniform(-3, 3, 2)
        readings = env._observation()[30:]
        for kind, first in ((1, 0), (-1, 8)):
            for b in range(10):
                best = 0.0
                for place in env.objects[first : first + 8]:
                    dx, dy = place - env.data.qpos[:2]
                    angle = np.arctan2(dy, dx) - yaw
                    angle = np.arctan2(np.sin(angle), np.cos(angle))
                    inside = -np.pi + b * np.pi / 5 <= angle < -np.pi + (b + 1) * np.pi / 5
                    if inside and np.hypot(dx, dy) <= 6:
                        best = max(best, 1 - np.hypot(dx, dy) / 6)
                assert math.isclose(readings[b + 10 * (kind < 0)], best, abs_tol=1e-6)


def test_gather_rewards_removes_and_ends__B():
    env = make("AntGather")
    env.reset(seed=0)
    env.objects = np.array([[0.0, 0.5], [0.5, 0.0], [0.0, -0.9], [8.0, 8.0]])
    env.values = np.array([1.0, 1.0, -1.0, -1.0])
    _, reward, terminated, _, info = env.step(np.zeros(8))
    assert reward == 1.0 and not terminated and info["is_success"]
    assert env.objects.tolist() == [[8, 8]]
    env.objects[:] = 0
    _, reward, terminated, *_ = env.step(np.zeros(8))
    assert reward == -1.0 and terminated, "nothing is left"
    for height, dead in ((0.1, True), (0.3, False), (1.2, True)):
        env.reset(seed=0)
        env.data.qpos[2] = height
        env.data.qvel[2] = 0
        assert env._task_step()[1] == dead


# ------------------------------------------------------------ train.py


@pytest.fixture
def run_train(capsys):
    """python train.py ... in this process: exit status, stdout, stderr."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def run(*args):
        code = 0
        try:
            train.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)


QUICK = ("--hidden", 16, "--batch-size", 8, "--start-steps", 100, "--eval-episodes", 2)
QUICK += ("--low-uniform-steps", 100, "--high-uniform-steps", 150)


def rows_without_time(folder):
    with open(folder / "progress.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def final_state(folder):
    state = torch.load(train.checkpoints(folder)[0], weights_only=True)
    del state["seconds"], state["progress"]
    return state


def test_same_seed_same_run_and_another_seed_another(tmp_path, run_train):
    args = ("--env", "PointMaze", "--total-steps", 400, "--eval-every", 150, *QUICK)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_train(*args, "--seed", seed, "--run-dir", tmp_path / name)[0] == 0
    a, b, c = (rows_without_time(tmp_path / name) for name in "abc")
    assert [row["step"] for row in a] == ["150", "300", "400"]
    assert a == b and a != c
    assert_same(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_short_run_ends_cleanly_and_leaves_its_files(name, tmp_path, run_train):
    for num_envs in (1, 4):
        folder = tmp_path / str(num_envs)
        code, out, err = run_train(
            *("--env", name, "--total-steps", 240, "--num-envs", num_envs, "--run-dir", folder),
            *QUICK,
        )
        assert (code, err) == (0, "")
        files = {path.name for path in folder.iterdir()}
        assert {"config.json", "progress.csv", "policy.pt"} <= files
        (row,) = rows_without_time(folder)
        assert row["step"] == "240" and 0 <= float(row["relabelled"]) <= 1
        shares = [float(row[f"chosen_{k}"]) for k in range(10)]
        assert math.isclose(sum(shares), 1, abs_tol=1e-4)
        assert math.isclose(sum(shares[1:]), float(row["relabelled"]), abs_tol=1e-5)
        policy = torch.load(folder / "policy.pt", weights_only=True)
        assert policy["env"] == name and {"latest", "best"} <= policy.keys()
    code, out, err = run_train("--eval-only", folder / "policy.pt", "--eval-episodes", 2)
    assert (code, err) == (0, "") and "success_rate" in out and "distance" in out


def test_paper_preset_is_appendix_C_and_the_authors_code():
    run, config = train.configs(train.parse(["--env", "AntPush", "--preset", "paper"]))
    expected = {
        "units": "raw",
        "subgoal_steps": 10,
        "low_relabel": 0.0,
        "rest_step": 0,
        "rest_reach": 0.4,
        "high_relabel": 1.0,
        "low_discount": 0.99,
        "high_discount": 0.99,
        "low_tau": 0.005,
        "high_tau": 0.005,
        "batch_size": 100,
        "hidden": 300,
        "low_noise": 1.0,
        "high_noise": 1.0,
        "policy_noise": 0.2,
        "noise_clip": 0.5,
        "policy_delay": 2,
        "low_actor_lr": 1e-4,
        "low_critic_lr": 1e-3,
        "high_actor_lr": 1e-4,
        "high_critic_lr": 1e-3,
        "low_reward_scale": 1.0,
        "high_reward_scale": 0.1,
        "low_buffer_size": 200_000,
        "high_buffer_size": 200_000,
        "start_steps": 2_500,
        "low_uniform_steps": 0,
        "high_uniform_steps": 0,
        "high_random": 0.0,
        "update_every": 1,
        "correction": True,
        "num_candidates": 10,
        "candidate_center": 1.0,
        "candidate_spread": 0.5,
    }
    assert dataclasses.asdict(config) == expected
    assert (run.eval_every, run.eval_episodes, run.num_envs, run.total_steps) == (
        50_000,
        50,
        1,
        10**7,
    )
    agent = HIRO(tasks.AntPush, config)
    assert (agent.high.actor.state_scale == 1).all() and (agent.high.critic.scale == 1).all()
    assert (agent.low.critic.scale == torch.tensor([1.0] * 43 + [30.0] * 8)).all()
    assert torch.equal(agent.high.max_action, torch.tensor(ANT_SUBGOAL_RANGE))
    torch.testing.assert_close(agent.high.policy_noise, torch.full((15,), 0.2))
    torch.testing.assert_close(agent.low.noise_clip, torch.full((8,), 0.5 / 30))


def test_the_default_shows_networks_numbers_of_order_one():
    agent = HIRO(tasks.AntMaze, HIROConfig())
    subgoal = ANT_SUBGOAL_RANGE
    inverse = [1 / g for g in subgoal]
    state = 13 * [1.0] + 14 * [0.2] + [1.0]  # without x and y
    for scale, expected in (
        (agent.low.actor.state_scale, state + inverse),
        (agent.low.critic.scale, state + inverse + 8 * [1.0]),
        (agent.high.actor.state_scale, [0.1, 0.1, *state, 0.1, 0.1]),
        (agent.high.critic.scale, [0.1, 0.1, *state, 0.1, 0.1, *inverse]),
        (agent.low.max_action, 8 * [1.0]),
        (agent.high.max_action, subgoal),
        (agent.low.policy_noise, 8 * [0.2]),
        (agent.high.policy_noise, [0.2 * g for g in subgoal]),
        (agent.low.noise_clip, 8 * [0.5]),
        (agent.high.noise_clip, [0.5 * g for g in subgoal]),
    ):
        torch.testing.assert_close(scale, torch.tensor(expected))


def test_flags_come_from_the_dataclasses_and_are_forgiving(run_train):
    given = train.parse(
        ["--total_steps", "1e6", "--no-correction", "--low-noise=0.5", "--env=AntFall"]
    )
    assert given == {"total_steps": 10**6, "correction": False, "low_noise": 0.5, "env": "AntFall"}
    given = train.parse(["--discount", "0.9", "--low-discount", "0.8"])
    assert given == {"high_discount": 0.9, "low_discount": 0.8}
    command = [sys.executable, "train.py", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True).stdout
    for config in (HIROConfig, train.RunConfig):
        for field in dataclasses.fields(config):
            assert "--" + field.name.replace("_", "-") in out


def test_profile_adds_up_and_counts_products_by_hand(run_train, monkeypatch, tmp_path):
    from results import speed

    monkeypatch.setitem(speed.SHORT_START, "start_steps", 40)
    monkeypatch.chdir(tmp_path)
    out = run_train("--env", "PointMaze", "--profile", 1, "--hidden", "32", "--batch-size", "16")[1]
    table = {line[:16].strip(): line[16:].split() for line in out.splitlines()}
    parts = [*speed.PARTS, "everything else"]
    for column in (0, 1):
        total = sum(float(table[part][column]) for part in parts)
        assert math.isclose(total, float(table["total"][column]), abs_tol=0.01)
    assert all(float(table[part][1]) >= 0 for part in parts)
    assert float(table["relabelling"][1]) > 0 and float(table["high update"][1]) > 0
    assert float(out.split()[-1]) > 1 and not list(tmp_path.iterdir())

    # one low update: S inputs to the actor, S + A to the critic, H hidden units; see TD3.update
    agent, S, A, H, B = HIRO(tasks.PointMaze, small()), 5, 2, 16, 8
    for _ in range(20):
        zero, no = np.zeros(1), np.zeros(1, bool)
        agent.observe(np.zeros((1, 7)), np.zeros((1, 2)), zero, np.zeros((1, 7)), no, no)
    actor, critic = S * H + H * H + H * A, (S + A) * H + H * H + H
    hidden = H * H + H  # gradients with respect to a network's hidden units, not to its inputs
    every = actor + 2 * critic + 2 * critic + 2 * (critic + hidden)
    delayed = actor + critic + (hidden + (S + A) * H) + (actor + H * H + H * A)
    assert speed.flops(agent.update_low, 2) == 2 * B * (every + delayed / 2)


@pytest.mark.parametrize("name", ["td3", "buffers", "relabel", "envs"])
def test_each_leaf_can_be_copied_alone(name):
    others = {"td3", "buffers", "relabel", "envs", "hiro", "train"} - {name}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(others)!r})); import {name}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


# ------------------------------------------------------------ never lose a run

TRAINING = ("--total-steps", 600, "--eval-every", 200, "--checkpoint-every", 150, *QUICK)


def interrupted(folder, args, after, how):
    """Start or resume a run and interrupt it once its newest checkpoint is at step >= after."""
    command = [sys.executable, "train.py", *map(str, args)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and step_of(folder) < after:
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be interrupted"
    process.send_signal(how)
    out = process.communicate()[0]
    return process.returncode, out


def step_of(folder):
    saved = train.checkpoints(folder)
    return int(saved[0].stem.split("_")[1]) if saved else 0


RUNS = {
    "point": ("--env", "PointMaze", *TRAINING),
    "three points": ("--env", "PointMaze", "--num-envs", 3, "--rest-step", 200, *TRAINING),
    "push": ("--env", "AntPush", *TRAINING, "--eval-every", 350, "--eval-episodes", 1),
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The runs above, with nothing to interrupt them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, args in RUNS.items():
        train.main([*map(str, args), "--run-dir", str(folder / name)])
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope="module")
def whole_run(whole_runs):
    return whole_runs["point"]


def assert_same_run(folder, whole):
    """The same CSV (time aside), weights, optimizers, buffers, generators and policy.pt."""
    assert rows_without_time(folder) == rows_without_time(whole)
    assert_same(final_state(folder), final_state(whole))
    policies = [torch.load(f / "policy.pt", weights_only=True) for f in (folder, whole)]
    assert_same(*policies)


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_equals_an_uninterrupted_one(name, tmp_path, run_train, whole_runs):
    folder = tmp_path / "run"
    code, _ = interrupted(folder, (*RUNS[name], "--run-dir", folder), 150, signal.SIGKILL)
    assert code == -signal.SIGKILL
    how = signal.SIGINT if name == "three points" else signal.SIGTERM
    code, out = interrupted(folder, ("--resume", folder), 300, how)
    assert code == 0 and f"stopped at step {step_of(folder)}" in out
    code, _, err = run_train("--resume", folder)
    assert code == 0, err
    assert_same_run(folder, whole_runs[name])


@pytest.mark.parametrize("name, evaluated, killed", [("point", 200, 300), ("push", 350, 450)])
def test_killed_between_evaluation_and_checkpoint__no_row_twice(
    name, evaluated, killed, tmp_path, monkeypatch, run_train, whole_runs
):
    """The evaluation is written, the next checkpoint is not: that row is lived again."""

    class Killed(BaseException):
        pass

    original = train.Training.save

    def save(self):
        if self.step == killed:
            raise Killed
        original(self)

    monkeypatch.setattr(train.Training, "save", save)
    with pytest.raises(Killed):
        run_train(*RUNS[name], "--run-dir", tmp_path / "run")
    monkeypatch.undo()
    assert [row["step"] for row in rows_without_time(tmp_path / "run")] == [str(evaluated)]
    assert run_train("--resume", tmp_path / "run")[0] == 0
    assert_same_run(tmp_path / "run", whole_runs[name])


def without_checkpoints(whole_run, folder):
    shutil.copytree(whole_run, folder)
    for path in train.checkpoints(folder):
        path.unlink()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    without_checkpoints(whole_run, folder)
    header = (folder / "progress.csv").read_text().split("\n")[0]
    (folder / "progress.csv").write_text(header + "\n")
    code, out, err = run_train("--resume", folder)
    assert (code, err) == (0, "") and "resumed at step 0" in out
    assert_same_run(folder, whole_run)


def test_a_run_whose_checkpoints_were_deleted_is_not_overwritten(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    without_checkpoints(whole_run, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = run_train("--resume", folder, "--total-steps", 10_000)
    assert code == 2 and "checkpoints are gone" in err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_an_unfinished_checkpoint_is_removed_by_the_next(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "checkpoint_000000000123.pt.tmp").write_bytes(b"killed here")
    assert run_train("--resume", folder, "--total-steps", 650)[0] == 0
    assert not list(folder.glob("*.tmp"))


def test_a_run_is_never_made_shorter_than_it_is(tmp_path, run_train, whole_run):
    before = (whole_run / "config.json").read_bytes()
    code, _, err = run_train("--resume", whole_run, "--total-steps", 100)
    assert code == 2 and "at 600 already" in err
    assert (whole_run / "config.json").read_bytes() == before


def test_resume_says_what_is_not_as_it_was(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["cpu"] = "abacus"
    (folder / "config.json").write_text(json.dumps(config))
    _, out, _ = run_train("--resume", folder)
    assert "started with cpu abacus, now" in out


def test_a_dead_environment_process_ends_the_run_in_one_line(tmp_path):
    run = train.RunConfig(env="PointMaze", total_steps=500, num_envs=2, async_envs=True)
    training = train.Training(run, small(), tmp_path)
    training.interact()
    worker = training.envs.processes[0]
    worker.kill()
    worker.join()
    with pytest.raises(train.UserError, match="step 2: an environment process died"):
        training.interact()
    for process in training.envs.processes:
        process.kill()


def test_config_json_remembers_resumes(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    assert run_train("--resume", folder, "--total-steps", 650)[0] == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["total_steps"] == 650 and config["resumed"][0]["step"] == 600
    code, out, _ = run_train("--resume", folder)
    assert code == 0 and "complete" in out


def test_resume_refuses_settings_that_another_version_did_not_have(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["algorithm"]["high_random"]
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run_train("--resume", folder, "--total-steps", 950)
    assert code == 2 and "high_random was another setting" in err and err.count("\n") == 1


def test_a_policy_older_than_a_setting_still_plays(tmp_path, run_train, whole_run):
    policy = torch.load(whole_run / "policy.pt", weights_only=True)
    del policy["config"]["rest_step"], policy["config"]["rest_reach"]
    torch.save(policy, tmp_path / "old.pt")
    plays = [run_train("--eval-only", f) for f in (whole_run / "policy.pt", tmp_path / "old.pt")]
    assert plays[0] == plays[1] and plays[0][0] == 0


def test_a_level_that_does_not_learn_leaves_its_columns_empty(whole_runs):
    rows = rows_without_time(whole_runs["three points"])  # its low level rests after step 200
    assert [row["low_q"] == "nan" for row in rows] == [False, True, True]
    assert all(row["high_q"] != "nan" for row in rows)


def test_resume_refuses_other_columns(tmp_path, run_train, whole_run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    path = train.checkpoints(folder)[0]
    state = torch.load(path, weights_only=True)
    torch.save({**state, "progress": "step,seed\n"}, path)
    code, _, err = run_train("--resume", folder, "--total-steps", 950)
    assert code == 2 and "other columns" in err and err.count("\n") == 1


def test_training_episodes_are_counted_at_their_last_step(tmp_path):
    run = train.RunConfig(env="PointMaze", total_steps=1300, num_envs=2, eval_episodes=1)
    training = train.Training(run, small(start_steps=10**6), tmp_path)
    seen, step = [], training.envs.step

    def watched(action):
        result = step(action)
        seen.append((result[3], result[4]["distance"]))
        return result

    training.envs.step = watched
    training.train()
    final = np.concatenate([distance[done] for done, distance in seen])
    (row,) = csv.DictReader((tmp_path / "progress.csv").read_text().splitlines())
    assert len(final) == 4
    assert math.isclose(float(row["train_distance"]), final.mean(), rel_tol=1e-5)
    assert float(row["train_success_rate"]) == (final < 5).mean()


def test_correction_can_be_left_out(tmp_path, run_train):
    args = ("--env", "PointMaze", "--no-correction", "--total-steps", 300, *QUICK)
    assert run_train(*args, "--run-dir", tmp_path / "run")[0] == 0
    (row,) = rows_without_time(tmp_path / "run")
    assert row["relabelled"] == row["chosen_3"] == "nan" and float(row["high_q"]) < 0


def test_worker_processes_give_the_same_run(tmp_path, run_train):
    args = ("--env", "PointMaze", "--num-envs", 2, "--total-steps", 200, *QUICK)
    assert run_train(*args, "--run-dir", tmp_path / "sync")[0] == 0
    assert run_train(*args, "--async-envs", "--run-dir", tmp_path / "async")[0] == 0
    assert rows_without_time(tmp_path / "async") == rows_without_time(tmp_path / "sync")
    assert_same(final_state(tmp_path / "async"), final_state(tmp_path / "sync"))


@pytest.mark.parametrize("damage", ["cut short", "one byte"])
def test_two_checkpoints_are_kept_and_a_damaged_newest_one_falls_back(
    damage, tmp_path, run_train, whole_run
):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    newest, older = train.checkpoints(folder)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data if damage == "one byte" else data[:-1000])
    code, out, err = run_train("--resume", folder)
    assert code == 0 and newest.name in err and "trying the one before" in err
    assert err.count("\n") == 1 and "resumed at step 450" in out
    assert_same_run(folder, whole_run)
    for path in train.checkpoints(folder):
        path.write_bytes(b"damaged")
    torch.save({"foreign": 1}, train.checkpoints(folder)[0])
    code, _, err = run_train("--resume", folder)
    assert code == 2 and "no readable checkpoint" in err


def test_a_finished_run_goes_on_with_more_steps(tmp_path, run_train, whole_run):
    shorter = [300 if arg == 600 else arg for arg in TRAINING]
    assert run_train("--env", "PointMaze", *shorter, "--run-dir", tmp_path / "run")[0] == 0
    assert run_train("--resume", tmp_path / "run", "--total-steps", 600)[0] == 0
    steps = [row["step"] for row in rows_without_time(tmp_path / "run")]
    assert steps == ["200", "300", "400", "600"]  # 300: the shorter run's last evaluation
    assert_same(final_state(tmp_path / "run")["agent"], final_state(whole_run)["agent"])


@pytest.mark.parametrize("quantity", ["action", "state", "low_q"])
def test_anything_not_finite_stops_training_in_one_line(quantity, tmp_path, monkeypatch, capsys):
    if quantity == "action":
        monkeypatch.setattr(HIRO, "act", lambda self, obs, **_: np.full((1, 2), np.nan, np.float32))
    elif quantity == "state":
        state = tasks.PointMaze._state
        monkeypatch.setattr(
            tasks.PointMaze, "_state", lambda env: state(env) + (np.nan if env.steps == 160 else 0)
        )
    else:
        update = HIRO.update_low
        monkeypatch.setattr(
            HIRO, "update_low", lambda agent: {**update(agent), "q": torch.tensor(math.nan)}
        )
    args = ("--env", "PointMaze", *TRAINING, "--run-dir", tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert f"{quantity} is not finite" in err and "step" in err and "checkpoint" in err
    if quantity == "state":
        assert "checkpoint_000000000150.pt" in err


def test_a_full_disk_is_one_line_and_costs_nothing_saved(tmp_path, run_train):
    """A limit on the size of files stands for the full disk: writing fails half way through."""
    folder = tmp_path / "run"
    args = ["--env", "PointMaze", "--run-dir", folder, *TRAINING]
    code = (
        "import resource, signal, sys, train; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); save = train.Training.save\n"
        "def limited(self):\n"
        "    if self.step >= 450: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "    save(self)\n"
        f"train.Training.save = limited; train.main({[str(a) for a in args]!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    assert [int(p.stem.split("_")[1]) for p in train.checkpoints(folder)] == [300, 150]
    code, out, _ = run_train("--resume", folder)
    assert code == 0 and "resumed at step 300" in out


def test_simulator_warnings_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it runs
    env = make("AntMaze")
    env.reset(seed=0)
    assert env.step(np.zeros(8))[4]["simulator_warnings"] == 0
    for _ in range(2):
        env.reset(seed=0)
        env.data.qvel[0] = 1e12  # MuJoCo: huge value in QVEL
        obs, _, _, _, info = env.step(np.zeros(8))
        assert info["simulator_warnings"] >= 1
        assert np.abs(obs[:2]).max() > 1e9 or not np.isfinite(obs).all(), "not back at the start"


@pytest.fixture(scope="module")
def a_run(tmp_path_factory, whole_run):
    """A finished run that the bad inputs can point at."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    shutil.copytree(whole_run, folder)
    torch.save({"weights": torch.zeros(3)}, folder.parent / "foreign.pt")
    (folder.parent / "text.pt").write_text("not a policy")
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "config.json").write_text("{")
    (folder.parent / "full").mkdir()
    (folder.parent / "full" / "file").write_text("something")
    return folder


has_matplotlib = importlib.util.find_spec("matplotlib") is not None
POINT = "--env PointMaze "
BAD_INPUTS = {
    "": "AntMaze, AntPush, AntFall, AntGather, PointMaze",
    "--env AntMoze": "AntMaze, AntPush, AntFall, AntGather, PointMaze",
    "--env": "expected one argument",
    POINT + "--total-steps 0": "must be at least 1",
    POINT + "--total-steps -5": "must be a finite number, not negative",
    POINT + "--total-steps 1.5": "not a whole number",
    POINT + "--total-steps many": "invalid whole number",
    POINT + "--total-steps inf": "whole number",
    POINT + "--high-random 1.5": "must be between 0 and 1",
    POINT + "--profile 0": "must be positive",
    POINT + "--profile --run-dir x": "--run-dir does not go with --profile",
    POINT + "--profile --plot x.png": "--plot goes with --eval-only POLICY",
    POINT + "--seed -1": "must be a finite number, not negative",
    POINT + "--seed 0.5": "not a whole number",
    POINT + "--eval-every 0": "must be at least 1",
    POINT + "--eval-episodes 0": "must be at least 1",
    POINT + "--checkpoint-every 0": "must be at least 1",
    POINT + "--num-envs 0": "must be at least 1",
    POINT + "--threads 0": "between 1 and 1024",
    POINT + "--threads 1e10": "between 1 and 1024",
    POINT + "--batch-size 0": "must be at least 1",
    POINT + "--batch-size 300000": "200000",
    POINT + "--subgoal-steps 0": "must be at least 1",
    POINT + "--num-candidates 1": "must be at least 2",
    POINT + "--update-every 0": "must be at least 1",
    POINT + "--hidden 2.5": "not a whole number",
    POINT + "--discount 1.5": "between 0 and 1",
    POINT + "--tau nan": "must be a finite number, not negative",
    POINT + "--low-noise inf": "must be a finite number, not negative",
    POINT + "--low-noise -0.1": "must be a finite number, not negative",
    POINT + "--low-actor-lr 0": "must be positive",
    POINT + "--units metres": "range, raw",
    POINT + "--preset td4": "paper",
    POINT + "--device cuda": "use cpu",
    POINT + "--device tpu": "cpu, cuda",
    POINT + "--bath-size 100": "did you mean --batch-size?",
    POINT + "extra": "unknown argument extra",
    POINT + "--run-dir {bad}/full": "not empty",
    POINT + "--run-dir {bad}/text.pt/run": "Not a directory",
    "--resume {bad}/nothing": "no run here",
    "--resume {run} --env AntMaze": "--env AntMaze differs",
    "--resume {run} --tau 0.1": "tau 0.1 differs",
    "--resume {run} --no-correction": "--correction False differs",
    POINT + "--high-relabel 0": "above 0",
    POINT + "--rest-reach 0": "a share above 0",
    POINT + "--rest-reach 4": "a share above 0",
    POINT + "--rest-step 10000": "more than --start-steps 10000",
    "--resume {run} --seed 5": "--seed 5 differs",
    "--eval-only {bad}/nothing.pt": "no such policy",
    "--eval-only {bad}/text.pt": "not a readable policy",
    "--eval-only {bad}/foreign.pt": "not a policy.pt",
    "--eval-only {run}/policy.pt --env AntPush": "a policy for PointMaze",
    "--eval-only {run}/policy.pt --eval-episodes 0": "must be at least 1",
    "--eval-only {run}/policy.pt --which worst": "best",
    "--eval-only {run}/policy.pt --plot {bad}/nowhere/a.png": "no such folder",
    "--eval-only {run}/policy.pt --plot {bad}/a.foo": ".png" if has_matplotlib else "matplotlib",
    "--eval-only {run}/policy.pt --video {bad}/a.foo": ".gif",
    "--eval-only {run}/policy.pt --subgoal-steps 3": "does not go with --eval-only",
    "--eval-only {run}/policy.pt --resume {run}": "does not go with --eval-only",
    POINT + "--seed 1e20": "below 2^63",
    POINT + "--render": "--render goes with --eval-only",
    "--resume {bad}/full": "no run here",
    "--resume {bad}/broken": "config.json is damaged",
}


@pytest.mark.parametrize("line", BAD_INPUTS)
def test_bad_input_gets_one_line_and_status_2(line, a_run, capsys, monkeypatch):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(a_run.parent)
    before = sorted(a_run.parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main(line.format(bad=a_run.parent, run=a_run).split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.startswith("train.py: ") and err.count("\n") == 1, err
    assert BAD_INPUTS[line] in err and out == ""
    assert sorted(a_run.parent.rglob("*")) == before, "nothing on disk is touched"


# ------------------------------------------------------------ see what it learns


def test_trajectories_are_drawn_from_the_episodes_that_were_counted(
    whole_run, run_train, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    from results import plot

    drawn = []
    original = plot.trajectories
    monkeypatch.setattr(plot, "trajectories", lambda *a: drawn.append(a) or original(*a))
    args = ("--eval-only", whole_run / "policy.pt", "--eval-episodes", 3)
    code, out, err = run_train(*args, "--plot", tmp_path / "paths.png")
    assert code == 0, err
    assert (tmp_path / "paths.png").read_bytes()[:4] == b"\x89PNG"
    _, env, episodes = drawn[0]
    distances = []
    for episode in episodes:
        assert episode["path"].shape == (300, 2) and episode["subgoals"].shape == (30, 2)
        assert np.array_equal(episode["path"][::10], episode["origins"])
        distances.append(np.linalg.norm(episode["path"][-1] - env.target))
    reported = float(out.split("distance")[1].split()[0])
    assert math.isclose(np.mean(distances), reported, abs_tol=0.5)  # one step before the last


def test_curves_are_drawn_from_csv_files_even_torn_ones(whole_run, tmp_path):
    pytest.importorskip("matplotlib")
    from results import plot

    folder = tmp_path / "anywhere"
    for seed in range(2):
        (folder / f"seed{seed}").mkdir(parents=True)
        text = (whole_run / "progress.csv").read_text()
        (folder / f"seed{seed}" / "progress.csv").write_text(text + seed * "900,0,")
        shutil.copy(whole_run / "config.json", folder / f"seed{seed}")
    groups = plot.find([folder])
    assert [len(run["step"]) for run in groups["PointMaze"]] == [3, 3]
    saved = json.loads((folder / "seed1" / "config.json").read_text())
    (folder / "seed1" / "config.json").write_text(json.dumps({**saved, "preset": "paper"}))
    plot.main([str(folder)])
    assert (folder / "curves.png").exists()
    words = (folder / "curves.svg").read_text()  # text is paths, with what it says in a comment
    assert "<!-- 0 of 1 seeds ≥ .9 at the end -->" in words
    assert "<!-- preset paper: 0 of 1 seeds ≥ .9 at the end -->" in words


def test_curves_leave_the_history_out_unless_it_is_asked_for(whole_run, tmp_path):
    from results import plot

    shutil.copytree(whole_run, tmp_path / "history")
    assert plot.find([tmp_path], without="history") == {}
    assert list(plot.find([tmp_path])) == ["PointMaze"]


def test_walk_measures_progress_and_falls(whole_run, monkeypatch):
    from results import walk

    agent = HIRO(tasks.AntMaze, small())
    walked, fallen = walk.walk(agent, 10.0, steps=20, directions=2)
    assert np.abs(walked).max() < 1 and not fallen.any(), "an untrained ant stands where it is"
    step = walk.OpenFloor.step

    def pushed(env, action):  # an ant that moves by (.1, .03) m at every step, whatever it is told
        env.data.qpos[:2] += 0.1, 0.03
        env.data.qvel[:] = 0
        return step(env, np.zeros(8))

    monkeypatch.setattr(walk.OpenFloor, "step", pushed)
    walked, _ = walk.walk(agent, 10.0, steps=20, directions=4)  # told +x, +y, -x, -y
    assert np.allclose(walked, [2, 0.6, -2, -0.6], atol=0.2)
    monkeypatch.setattr(walk.OpenFloor, "step", step)
    agent.low_action = lambda *_, **__: torch.ones(1, 8)
    upside_down = []
    reset = walk.OpenFloor.reset

    def flipped(env, **kwargs):
        reset(env, **kwargs)
        env.data.qpos[3:7] = 0, 1, 0, 0
        upside_down.append(env)
        return env._observation(), {}

    monkeypatch.setattr(walk.OpenFloor, "reset", flipped)
    _, fallen = walk.walk(agent, 10.0, steps=2, directions=2)
    assert fallen.all() and len(upside_down) == 2
    for paths, words in (
        ([], "name one policy.pt"),
        ([whole_run / "policy.pt"], "no ant on a floor"),
    ):
        with pytest.raises(SystemExit, match=words):
            walk.main(paths)


def test_a_video_shows_an_episode(whole_run, run_train, tmp_path, off_screen, monkeypatch):
    monkeypatch.setattr(tasks.PointMaze, "max_steps", 12)  # drawing without a GPU is slow
    args = ("--eval-only", whole_run / "policy.pt", "--eval-episodes", 1)
    code, _, err = run_train(*args, "--video", tmp_path / "film.gif")
    assert code == 0, err
    assert (tmp_path / "film.gif").read_bytes()[:3] == b"GIF"


# ------------------------------------------------------------ slow: pytest -m slow


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_point_maze_is_learned_within_twenty_minutes(seed, tmp_path):
    command = [sys.executable, "train.py", "--env", "PointMaze", "--seed", str(seed)]
    command += ["--eval-every", "10000", "--run-dir", str(tmp_path / "run")]
    subprocess.run(command, cwd=HERE, timeout=2 * 3600, check=True)
    with open(tmp_path / "run" / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    solved = [row for row in rows if float(row["success_rate"]) >= 0.9]
    assert solved and float(solved[0]["seconds"]) < 20 * 60


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path, run_train, whole_run):
    """SIGKILL whenever it falls; every checkpoint stays readable and the run ends as if alone."""
    folder = tmp_path / "run"
    first = ("--env", "PointMaze", *TRAINING, "--checkpoint-every", 10, "--run-dir", folder)
    rng = np.random.default_rng(0)
    progress = []
    for _ in range(20):
        started = (folder / "config.json").exists()
        if not started:
            shutil.rmtree(folder, ignore_errors=True)
        args = ("--resume", folder) if started else first
        process = subprocess.Popen(
            [sys.executable, "train.py", *map(str, args)], cwd=HERE, stdout=subprocess.DEVNULL
        )
        before = progress[-1] if progress else 0
        deadline = time.monotonic() + 60
        while step_of(folder) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)  # wait for the run to make a step forward, then any moment will do
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in train.checkpoints(folder):
            torch.load(path, weights_only=True)
        progress.append(step_of(folder))
    assert progress == sorted(progress) and progress[0] > 0
    assert run_train("--resume", folder)[0] == 0
    assert rows_without_time(folder) == rows_without_time(whole_run)
    assert_same(final_state(folder), final_state(whole_run))
