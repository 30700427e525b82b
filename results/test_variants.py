"""Tests of the paper's other rows; each oracle is worked out by hand or by a loop."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import envs as tasks
import hiro
import relabel
import test_hiro
import train
from harness import options
from results import variants

CONFIG = test_hiro.small(high_uniform_steps=100, low_relabel=0.5, high_random=0.2)
learn = test_hiro.learn  # the fixture


def test_pre_training_is_on_gaussian_subgoals_and_then_over(learn):
    agent = variants.PreTraining(tasks.PointPush, CONFIG)
    learn(agent, 140, tasks.PointPush)
    assert (agent.low.updates, agent.high.updates) == (60, 4)  # from 41 to 100; at 110 ... 140
    for agent.steps, gaussian in ((100, True), (101, False)):
        subgoal = agent.high_action(torch.zeros(20_000, 7), torch.ones(20_000).bool())
        within = (subgoal.abs() < 2.5).float().mean()  # one standard deviation
        assert (abs(within - 0.683) < 0.01) == gaussian and subgoal.abs().max() <= 5


def test_the_transition_policy_gradient_s_subgoals_are_what_happened():
    agent = variants.TransitionPolicyGradient(tasks.PointPush, CONFIG)
    state, next_state = torch.zeros(20_000, 9), torch.zeros(20_000, 9)
    state[:, 1], next_state[:, 0] = 1.0, 4.9
    subgoal, chosen = agent.correct(
        {"state": state, "next_state": next_state, "subgoal": state[:, :2]}
    )
    assert (chosen == 1).all() and subgoal.max() == 5
    assert abs(subgoal[:, 1].mean() + 1) < 0.02 and abs(subgoal[:, 1].std() - 0.5) < 0.02


def test_without_hierarchy_one_td3_is_paid_for_the_task(learn):
    config = dataclasses.replace(CONFIG, high_reward_scale=0.5)
    agent = variants.NoHierarchy(tasks.PointPush, config)
    learn(agent, 140, tasks.PointPush)
    rows = agent.low_buffer.rows()
    assert (agent.low.updates, agent.high.updates) == (100, 0) and len(rows["reward"]) == 140
    places, target = rows["next_state"][:, :2], torch.tensor([0.0, 19.0])
    torch.testing.assert_close(rows["reward"], -0.5 * (places - target).norm(dim=1))
    assert torch.equal(rows["state"][1:], rows["next_state"][:-1])
    obs = rows["state"][:, :7]
    acts = agent.policy.act(obs)
    assert np.array_equal(acts, agent.low.act(rows["state"])) and (acts[1:] != acts[0]).any()


def test_directions_are_carried_over_and_pay_the_cosine(monkeypatch):
    for module, name in ((train, "goal_transition"), (train, "intrinsic_reward")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back behind this test
        monkeypatch.setattr(hiro, name, getattr(hiro, name))
    monkeypatch.setattr(relabel, "subgoal_sequences", relabel.subgoal_sequences)
    variants.directions()
    args = np.array([1.0, 1.0, 9.0]), np.array([3.0, 4.0]), np.array([1.0, 6.0, 0.0])
    for module in (train, hiro):
        assert np.isclose(module.intrinsic_reward(*args), 4 / 5)  # of (0, 5) and (3, 4)
        assert module.goal_transition(*args) is args[1]
    states, actions = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    subgoal, next_state, scale = torch.randn(3, 2), torch.randn(3, 2), torch.ones(2)
    args = lambda s, g: g + s, states, actions, subgoal, next_state, scale  # noqa: E731
    chosen, index = relabel.relabel(*args, generator=torch.Generator().manual_seed(0))
    every = relabel.candidate_subgoals(
        states[:, 0], next_state, subgoal, scale, generator=torch.Generator().manual_seed(0)
    )
    for b in range(3):
        misses = [sum(((actions[b] - g - states[b]) ** 2).sum(1)) for g in every[b]]
        assert index[b] == np.argmin(misses) and torch.equal(chosen[b], every[b, index[b]])


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_each_row_is_one_command_and_says_which_it_is(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda agent, run: None)
    monkeypatch.setattr(variants, "directions", lambda: None)
    variants.main([name, "--env", "PointPush", "--run-dir", str(tmp_path / "run")])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["variant"] == name
    assert saved["algorithm"]["correction"] == (name != "no-correction")
    assert saved["algorithm"]["low_relabel"] == (1 if name == "random-subgoals" else 0.5)


def test_a_variant_must_be_named():
    for argv in ([], ["--env", "PointPush"]):
        with pytest.raises(options.UserError, match="no-correction, random-subgoals"):
            variants.main(argv)
