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
from results import variants

CONFIG = test_hiro.small(high_uniform_steps=100, low_relabel=0.5, high_random_again=0.2)
learn = test_hiro.learn  # the fixture


def test_pre_training_is_on_gaussian_subgoals_and_then_over(learn):
    agent = variants.PreTraining(tasks.PointPush, CONFIG)
    learn(agent, 140, tasks.PointPush)
    assert (agent.low.updates, agent.high.updates) == (60, 4)  # 41 to 100; every tenth to 140
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
    assert agent.low.discount**10 == pytest.approx(0.99)
    places, target = rows["next_state"][:, :2], torch.tensor([0.0, 19.0])
    torch.testing.assert_close(rows["reward"], -0.5 * (places - target).norm(dim=1))
    for_ever = rows["reward"] / (1 - agent.low.discount)  # 0.5 % less if c at once are discounted
    torch.testing.assert_close(rows["floor"], for_ever, rtol=0.006, atol=0)
    assert agent.low.ceiling == 0
    assert torch.equal(rows["state"][1:], rows["next_state"][:-1])
    obs = rows["state"][:, :7]
    acts = agent.policy.act(obs)
    assert np.array_equal(acts, agent.low.actor_target(obs)) and (acts[1:] != acts[0]).any()


@pytest.fixture
def there(monkeypatch):
    """Where subgoals live may be moved in the test, and is put back after it."""
    for module in (train, hiro):
        for name in ("goal_transition", "intrinsic_reward"):
            monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("candidate_subgoals", "subgoal_sequences"):
        monkeypatch.setattr(relabel, name, getattr(relabel, name))
    for name in ("embed", "directions"):
        monkeypatch.setattr(variants.space, name, getattr(variants.space, name))
    return variants.space


def is_there():
    """Whether loop, agent and relabelling all look for subgoals where the variants put them."""
    found = [train.goal_transition, hiro.goal_transition, relabel.candidate_subgoals]
    found += [train.intrinsic_reward, hiro.intrinsic_reward, relabel.subgoal_sequences]
    moved = {function.__module__ == variants.__name__ for function in found}
    assert len(moved) == 1
    return moved.pop()


def least_missed(policy, states, actions, every, wanted):
    """The relabelling by a loop: wanted(g, states, i) is what g asks for at step i."""
    for b, candidates in enumerate(every):
        misses = [
            sum(
                ((actions[b, i] - policy(states[b, i], wanted(g, states[b], i))) ** 2).sum()
                for i in range(states.shape[1])
            )
            for g in candidates
        ]
        yield int(np.argmin(misses))


def test_directions_are_carried_over_and_pay_the_cosine(there):
    there.directions = True
    variants.move_there()
    args = np.array([1.0, 1.0, 9.0]), np.array([3.0, 4.0]), np.array([1.0, 6.0, 0.0])
    for module in (train, hiro):
        assert np.isclose(module.intrinsic_reward(*args), 4 / 5)  # of (0, 5) and (3, 4)
        assert module.goal_transition(*args) is args[1]
    states, actions = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    subgoal, next_state, scale = torch.randn(3, 2), torch.randn(3, 2), torch.ones(2)
    policy = lambda s, g: g + s  # noqa: E731
    args, seed = (policy, states, actions, subgoal, next_state, scale), torch.Generator
    chosen, index = relabel.relabel(*args, generator=seed().manual_seed(0))
    args = states[:, 0], next_state, subgoal, scale
    every = variants.candidate_subgoals(*args, generator=seed().manual_seed(0))
    right = list(least_missed(policy, states, actions, every, lambda g, states, i: g))
    assert index.tolist() == right and torch.equal(chosen, every[torch.arange(3), index])


def test_subgoals_are_changes_of_the_embedding(there):
    """Of squares, (x, y) -> (x^2, y^2), everywhere: the reward, h, the candidates, their steps."""
    variants.move_there()
    there.embed = lambda state: state[..., :2] ** 2
    args = np.array([1.0, 2.0, 9.0]), np.array([6.0, 4.0]), np.array([2.0, 2.0, 0.0])
    for module in (train, hiro):
        assert module.goal_transition(*args).tolist() == [3, 4]  # (1, 4) + (6, 4) - (4, 4)
        assert module.intrinsic_reward(*args) == -5
    states, actions = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    subgoal, next_state, scale = torch.randn(3, 2), torch.randn(3, 5), torch.ones(2)
    policy = lambda s, g: g + s[..., :2]  # noqa: E731
    args, seed = (policy, states, actions, subgoal, next_state, scale), torch.Generator
    chosen, index = relabel.relabel(*args, generator=seed().manual_seed(0))
    args = states[:, 0, :2] ** 2, next_state[:, :2] ** 2, subgoal, scale
    every = variants.candidate_subgoals(*args, generator=seed().manual_seed(0))
    squared = lambda g, states, i: g + states[0, :2] ** 2 - states[i, :2] ** 2  # noqa: E731
    assert index.tolist() == list(least_missed(policy, states, actions, every, squared))
    assert torch.equal(chosen, every[torch.arange(3), index])


@pytest.mark.parametrize("kind", [variants.Representation, variants.FeUdal])
def test_the_representation_is_the_high_level_s_and_its_critic_s_loss_teaches_it(
    there, learn, kind
):
    variants.move_there()
    there.directions = kind is variants.FeUdal
    config = dataclasses.replace(CONFIG, critic_lr=1e-6, squash_cost=0.0)
    agent = kind(tasks.PointPush, config)
    learn(agent, 160, tasks.PointPush)
    sight, batch = agent.high.sight, agent.high_buffer.sample(8)
    assert agent.max_subgoal.tolist() == [1, 1] and agent.high.updates == 12  # in school, too
    seen = sight(batch["state"])  # phi(s), target, block
    assert seen.shape == (8, 2 + 2 + 2) and torch.equal(seen[:, 2:], batch["state"][:, 5:])

    step = agent.low_buffer.sample(8)
    test_hiro.stir(sight, 0.3, 5)  # old rewards were paid for another phi
    before, after = (sight.embed(step[name]).detach() for name in ("state", "next_state"))
    asked = step["subgoal"].clone()
    agent.swap_subgoals(step)
    assert torch.equal(step["subgoal"], torch.cat([asked.roll(1, 0)[:4], asked[4:]]))
    assert agent.policy.low_input(step["state"], asked).shape == (8, 5 + 2)  # x and y, too
    aim = before + step["subgoal"] - after
    if there.directions:
        reward, aim = torch.cosine_similarity(after - before, step["subgoal"]), step["subgoal"]
    else:
        reward = -aim.norm(dim=1)
    torch.testing.assert_close(step["reward"], agent.config.low_reward_scale * reward)
    torch.testing.assert_close(step["next_subgoal"], aim)

    if kind is variants.FeUdal:
        changes = sight.embed(batch["next_state"]) - sight.embed(batch["state"])
        drawn = torch.stack([agent.correct(batch)[0] for _ in range(400)])
        changes = changes.detach().clamp(-0.6, 0.6)  # of those within the range, with room
        near = changes.abs() < 0.6
        assert (drawn.mean(0) - changes)[near].abs().max() < 0.03
        assert 0.09 < drawn.std(0)[near].mean() < 0.11

    batch["action"], agent.high.policy_noise = batch["subgoal"], torch.zeros(2)
    for seed, critic in enumerate((agent.high.critic, agent.high.critic_target)):
        test_hiro.stir(critic, 0.3, seed)
    before = agent.high.sight_target.phi[2].bias.clone()
    view, weight = agent.high.sight_target(batch["next_state"]), sight.phi[2].bias
    batch["floor"] = -0.1 + 0.1 * torch.rand(8)  # of some rows' targets it decides
    y = agent.high.target_q(batch["reward"], view, batch["terminated"], batch["floor"])

    def loss():
        q = torch.stack(agent.high.critic(sight(batch["state"]), batch["action"]))
        return torch.nn.functional.huber_loss(q, y.expand_as(q), reduction="sum").item() / 8

    slopes = []
    for i in range(2):
        values = []
        for change in (0.001, -0.002):
            weight.data[i] += change
            values.append(loss())
        weight.data[i] += 0.001
        slopes.append((values[0] - values[1]) / 0.002)
    was, critic_was = weight.detach().clone(), agent.high.critic_target.net1[0].bias.clone()
    agent.high.policy_delay = 1
    agent.high.update(batch)
    torch.testing.assert_close(weight.grad, torch.tensor(slopes), rtol=0.02, atol=1e-3)
    assert ((weight - was) * weight.grad < 0).all()  # downhill
    target, tau = agent.high.sight_target.phi[2].bias, agent.config.tau
    torch.testing.assert_close(target, before + tau * (weight - before))
    assert (agent.high.critic_target.net1[0].bias != critic_was).any()


def test_a_representation_is_saved_with_its_policy(there, learn, tmp_path):
    variants.move_there()
    agent = variants.Representation(tasks.PointPush, CONFIG)
    learn(agent, 160, tasks.PointPush, eval_every=160)
    obs = torch.randn(25, 3, 7)
    acts = np.stack([agent.policy.act(o) for o in obs])
    other = variants.Representation(tasks.PointPush, CONFIG, seed=1)
    other.load_state_dict(agent.state_dict())
    for part in ("sight", "sight_target", "sight_optimizer"):
        test_hiro.assert_same(*(getattr(a.high, part).state_dict() for a in (other, agent)))
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)["latest"]["policy"]
    there.embed = None  # a program that only evaluates has made no agent
    seeing = variants.SeeingPolicy.from_state_dict(saved)
    for policy in (seeing, other.policy):
        assert np.array_equal(acts, np.stack([policy.act(o) for o in obs]))


AGENTS = {
    "no-correction": hiro.HIRO,
    "own-subgoals": hiro.HIRO,
    "random-subgoals": hiro.HIRO,
    "pre-training": variants.PreTraining,
    "no-hierarchy": variants.NoHierarchy,
    "representation": variants.Representation,
    "cosine": variants.Directions,
    "transition": variants.TransitionPolicyGradient,
    "feudal": variants.FeUdal,
}


@pytest.mark.parametrize("name", AGENTS)
def test_each_row_is_one_command_and_goes_on_as_no_other(
    name, tmp_path, monkeypatch, capsys, there
):
    folder, agents = tmp_path / "run", []
    monkeypatch.setattr(train, "train", lambda agent, run: agents.append(agent))
    variants.main([name, "--env", "PointPush", "--run-dir", str(folder)])
    saved = json.loads((folder / "config.json").read_text())
    assert saved["variant"] == name
    assert saved["algorithm"]["correction"] == (name != "no-correction")
    shares = {"own-subgoals": 0, "random-subgoals": 1}
    assert saved["algorithm"]["low_relabel"] == shares.get(name, 0.5)
    assert there.directions == (name in ("cosine", "feudal"))
    variants.main([name, "--resume", str(folder)])
    assert [type(agent) for agent in agents] == 2 * [AGENTS[name]]
    assert AGENTS.keys() == variants.VARIANTS.keys()
    costs = {"no-hierarchy": 0.001, "cosine": 0, "feudal": 0}  # where an action is worth less
    assert agents[0].low.squash_cost == costs.get(name, 0.01)
    assert is_there() == (name in ("representation", "cosine", "feudal"))
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", str(folder)])
    assert f"is for python results/variants.py {name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no-hierarchy", "feudal"])
def test_a_row_s_policy_is_evaluated_by_its_name_alone(name, tmp_path, capsys, there):
    path, few = str(tmp_path / "policy.pt"), ["--batch-size=8", "--hidden=8"]
    few += ["--total-steps=60", "--start-steps=20", "--eval-every=60", "--eval-episodes=1"]
    variants.main([name, "--env=PointPush", f"--run-dir={tmp_path}", *few])
    assert f"variants.py {name} --eval-only {path}" in capsys.readouterr().out
    variants.main([name, "--eval_only", path, "--eval-episodes=1"])
    assert "trained for 60 steps" in capsys.readouterr().out
    for wrong in (train.main, lambda argv: variants.main(["no-correction", *argv])):
        with pytest.raises(SystemExit, match="2"):
            wrong(["--eval-only", path])
        assert f"is for python results/variants.py {name}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"the variant {name}"):
        hiro.Policy.load(path)


def test_a_variant_must_be_named(capsys):
    for argv in ([], ["--env", "PointPush"]):
        with pytest.raises(SystemExit, match="2"):
            variants.main(argv)
        assert "name a variant first: no-correction, own" in capsys.readouterr().err
    variants.main(["--help"])
    explained = capsys.readouterr().out
    assert all(f"\n{name} " in explained for name in AGENTS)


def test_hiro_s_own_run_goes_on_as_no_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda agent, run: None)
    train.main(["--env=PointPush", f"--run-dir={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        variants.main(["transition", "--resume", str(tmp_path)])
    assert "is for python train.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no-hierarchy", "representation"])
def test_raw_units_are_refused_where_there_are_none(name, tmp_path, capsys, there):
    with pytest.raises(SystemExit, match="2"):
        variants.main([name, "--env=PointPush", "--preset=paper", f"--run-dir={tmp_path}"])
    assert "--units raw" in capsys.readouterr().err


def test_a_low_level_that_would_never_learn_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        variants.main(["pre-training", "--env=PointPush", "--preset=paper", "--run-dir=run"])
    assert "--high-uniform-steps 0: the low level learns only from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
