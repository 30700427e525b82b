"""The off-policy correction (section 3.3): subgoals replaced by ones that fit today's low level.

A high-level transition says "with subgoal g the environment went from s_t to s_{t+c}". Once the
low level has changed, g would no longer lead there. So g is replaced by whichever of ten
candidates makes the low-level actions that were really taken most likely today.

Pure functions. Shapes: B batch, K candidates, c steps, d subgoal dimensions, S state, A action.
`policy(state, subgoal) -> action` is any callable over leading dimensions.
"""

import torch


def candidate_subgoals(
    state, next_state, subgoal, max_subgoal, num_random=8, spread=0.5, generator=None
):
    """Candidates for one segment each (sections 3.3, C.3).

    state       [B, >= d]  s_t, raw
    next_state  [B, >= d]  s_{t+c}, the state after the segment's last action
    subgoal     [B, d]     g_t, what the high level asked for
    max_subgoal [d]        half-range of the subgoals
    spread                 the random candidates' standard deviation is spread * max_subgoal
    returns     [B, 2 + num_random, d]  0 the original, 1 the difference, then the random ones;
                           all clipped to ±max_subgoal
    """
    batch, dims = subgoal.shape
    difference = next_state[:, :dims] - state[:, :dims]
    shape = batch, num_random, dims
    noise = torch.randn(shape, generator=generator, device=subgoal.device)
    random = difference[:, None] + spread * max_subgoal * noise
    candidates = torch.cat([subgoal[:, None], difference[:, None], random], 1)
    return candidates.clamp(-max_subgoal, max_subgoal)


def subgoal_sequences(states, candidates):
    """What each candidate would have asked for at each step, h iterated: g_i = g_t + s_t - s_i.

    states      [B, c, >= d]  s_t ... s_{t+c-1}
    candidates  [B, K, d]
    returns     [B, K, c, d]
    """
    moved = states[:, :1] - states  # s_t - s_i
    return candidates[:, :, None] + moved[:, None, :, : candidates.shape[-1]]


def log_likelihood(policy, states, actions, sequences, mask=None):
    """log mu^lo(a_{t:t+c-1} | s, g) = -1/2 sum_i ‖a_i - mu^lo(s_i, g_i)‖² + const (eq. 5).

    states     [B, c, S]     actions [B, c, A]
    sequences  [B, K, c, d]  subgoals of every step under every candidate
    mask       [B, c]        1 for steps that happened; 0 after the end of a short segment
    returns    [B, K]
    """
    # one candidate at a time, as all at once do not fit a processor's cache
    errors = [(actions - policy(states, g)).square().sum(-1) for g in sequences.unbind(1)]
    error = torch.stack(errors, 1)  # [B, K, c]
    if mask is not None:
        error = error * mask[:, None]
    return -0.5 * error.sum(-1)


@torch.no_grad()
def relabel(
    policy,
    states,
    actions,
    subgoal,
    next_state,
    max_subgoal,
    mask=None,
    num_random=8,
    generator=None,
):
    """The most likely candidate of each segment; arguments as in the functions above.

    returns  subgoal [B, d], index [B] of the chosen candidate (0: the original, clipped)
    """
    candidates = candidate_subgoals(
        states[:, 0], next_state, subgoal, max_subgoal, num_random, generator=generator
    )
    sequences = subgoal_sequences(states, candidates)
    index = log_likelihood(policy, states, actions, sequences, mask).argmax(1)
    return candidates[torch.arange(len(index), device=index.device), index], index
