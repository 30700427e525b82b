"""Train and evaluate HIRO: python train.py --env AntPush. See --help, and README.md.

train() is the paper's pseudo-code. What a run needs besides (flags, files, films) is in harness/.
"""

import contextlib
import sys

import numpy as np
import torch

from harness import options, runs
from hiro import HIRO, goal_transition, intrinsic_reward


def train(agent, run):
    """HIRO (section 3): act, step, store, learn, in N environments at once.

    A row of a tensor is one environment: obs [N, obs], subgoal [N, d], action [N, A], the rest [N].
    """
    c = agent.config.subgoal_steps
    obs, subgoal, clock = run.begin(agent)  # clock: steps since the subgoal was fresh
    while run.goes_on():
        fresh = clock == 0  # every c steps, and at an episode's first
        if fresh.any():  # g = mu^hi(s)
            subgoal = torch.where(fresh[:, None], agent.high_action(obs, fresh), subgoal)
        action = agent.low_action(obs, subgoal)  # a = mu^lo(s, g)
        next_obs, reward, terminated, done = run.env_step(action)  # R, s'
        agent.steps += run.num_envs

        next_subgoal = goal_transition(obs, subgoal, next_obs)  # h(s, g, s') = s + g - s'
        low_reward = intrinsic_reward(obs, subgoal, next_obs)  # r = -‖s + g - s'‖
        agent.remember_step(obs, subgoal, action, low_reward, next_obs, next_subgoal)
        ended = done | (clock == c - 1)
        agent.remember_segment(
            clock, obs, subgoal, action, reward, next_obs, terminated, done, ended
        )

        for update in agent.due_updates(run.num_envs):  # one for each environment step (C.2)
            run.add_metrics("low", agent.update_low())
            if update % agent.config.high_update_every == 0 and agent.high_learns:
                run.add_metrics("high", agent.update_high())  # relabels its batch first (3.3)

        obs, subgoal = run.reset_done(next_obs, done), next_subgoal
        clock = (clock + 1).masked_fill(ended, 0)

        run.check()
        if run.due(run.eval_every):
            with run.untimed():
                results = evaluate(agent.policy, run.eval_envs, run.eval_episodes, run.eval_seed)
                run.report(mean(results))
        if run.due(run.checkpoint_every) or run.stop:
            with run.untimed():
                run.save(obs, subgoal, clock)
    run.terminal.end(agent.steps)


def evaluate(policy, envs, episodes, seed, watch=None):
    """Episodes without noise (C.4), as many at a time as there are environments.

    watch    called before every step t as watch(t, obs [N, obs], subgoal [N, d])
    returns  a dict for each episode: success_rate (1 or 0, at the last step), return, distance
             (final, m), steps, intrinsic_return, and subgoal_progress (how much nearer to its
             subgoal a segment ends, about metres)
    """
    results = []
    while len(results) < episodes:
        results += play(policy, envs, seed + len(results), watch)
    return results[:episodes]


def play(policy, envs, seed, watch=None):
    """One episode in each of N environments; arguments and result as evaluate()'s."""
    n, c = envs.num_envs, policy.subgoal_steps
    totals = {name: np.zeros(n) for name in ("return", "intrinsic_return", "subgoal_progress")}
    results = [None] * n
    obs, _ = envs.reset(seed=seed)
    policy.reset()
    steps = 0
    while None in results:
        action = policy.act(obs)
        subgoal = policy.subgoal.cpu().numpy()
        if watch:
            watch(steps, obs, subgoal)
        next_obs, reward, terminated, truncated, info = envs.step(action)
        steps += 1
        intrinsic = intrinsic_reward(obs, subgoal, next_obs)
        totals["return"] += reward
        totals["intrinsic_return"] += intrinsic
        totals["subgoal_progress"] += np.linalg.norm(subgoal, axis=1) + intrinsic
        done = terminated | truncated
        for i in np.flatnonzero(done):
            if results[i] is None:
                results[i] = {name: float(total[i]) for name, total in totals.items()}
                results[i]["steps"] = steps
                results[i]["subgoal_progress"] *= c / steps
                results[i]["success_rate"] = float(info["is_success"][i])
                results[i]["distance"] = float(info["distance"][i])
        policy.reset(done)
        obs = runs.reset_done(envs, next_obs, done)
    return results


def mean(results):
    """The means of evaluate()'s results over the episodes."""
    names = ("success_rate", "return", "distance", "intrinsic_return", "subgoal_progress")
    return {name: float(np.mean([result[name] for result in results])) for name in names}


def eval_only(given, agent_class=HIRO, variant=None):
    """Print what a saved policy achieves; draw, film or show it if asked to."""
    from harness import look

    path, which = given["eval_only"], given.get("which", "latest")
    saved = runs.load_policy(path, variant)
    if given.get("env", saved["env"]) != saved["env"]:
        raise options.UserError(f"{path} is a policy for {saved['env']}, not {given['env']}")
    settings, _ = options.configs({**given, "env": saved["env"]})
    runs.prepare(settings.threads)
    policy = agent_class.policy_class.from_state_dict(saved[which]["policy"], settings.device)
    with look.Viewer(settings, given, policy.subgoal_steps) as viewer:
        print(f"{settings.env}, trained for {saved[which]['step']:,} steps: {viewer.plan}")
        results = evaluate(policy, viewer.envs, viewer.episodes, settings.seed, viewer.watch)
        for name, value in mean(results).items():
            print(f"{name:>18} {value:10.3f}")
        viewer.finish(results)


def main(argv=None, agent_class=HIRO, variant=None):
    """Do what the command line says, with HIRO or, under a name of its own, a variant of it."""
    with options.one_line_errors():
        given = options.parse(sys.argv[1:] if argv is None else argv)
        if "eval_only" in given:
            return eval_only(given, agent_class, variant)
        run = (runs.resume if "resume" in given else runs.start)(given, variant)
        with contextlib.closing(run):
            with run.set_up():
                agent = agent_class(run.task, run.config, run.num_envs, run.seed, run.device)
            train(agent, run)


if __name__ == "__main__":
    main()
