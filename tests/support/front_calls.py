"""A good call of every public function, by argument, on a batch of three sequences of five tokens; and what its
arguments are said to be."""

import inspect
import typing

import torch
from torch import Tensor

import tokenrl
from tokenrl import (
    advantages,
    akl,
    aligndistil,
    bounds,
    compat,
    conflicts,
    corrections,
    divergence_weights,
    group_losses,
    hidden_reward,
    intro,
    m2po,
    preference_weights,
    rewards,
    self_distillation,
    sft_weights,
    uld,
    xtoken,
)
from tokenrl import on_policy_distillation as opd
from tokenrl import selection as d3s
from tokenrl.objectives.metrics import Metrics

INT = torch.int64
DRAW = torch.Generator().manual_seed(3)


def _draw(*shape):
    return torch.rand(shape, generator=DRAW)


MASK = torch.ones(3, 5, dtype=torch.bool)
GROUPS = torch.tensor([0, 0, 1])
LENGTHS = torch.tensor([5, 4, 3])
CORRECT = torch.tensor([True, False, True])
LOGP, OLD, X, HIDDEN, WEIGHT, LOGITS = (
    -_draw(3, 5),
    -_draw(3, 5),
    _draw(3, 5),
    _draw(3, 5, 4),
    _draw(11, 4),
    _draw(3, 5, 11),
)
R = _draw(3)
IDS = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 4, 4, 5], [6, 7, 8, 9, 10]])
TOKENS = {"mask": MASK}
MOVED = {"logp": LOGP, "old_logp": OLD, "advantages": R}
GROUPED = {"logp": LOGP, "old_logp": OLD, "group_ids": GROUPS} | TOKENS
REWARDED = {"rewards": R, "group_ids": GROUPS}
LOSS = {
    "old_logp": OLD, "advantages": R, "mask": MASK, "segment_ids": IDS, "group_ids": GROUPS, "rollout_logp": LOGP,
    "token_weight": X, "aggregation": "group-mean", "normalizer": 2.0, "ref_logp": OLD, "kl_coef": 0.1,
    "entropy_coef": 0.1,
}  # fmt: skip
VOCABULARY = {"temperature": 1.0, "softcap": 30.0, "logit_scale": 1.0, "keep_mask": torch.ones(11, dtype=torch.bool)}
HEAD = {"hidden": HIDDEN, "weight": WEIGHT, "bias": _draw(11), "memory_budget": 1 << 20} | VOCABULARY
SHARED = {"rewards": R, "group_ids": GROUPS}
POLICIES = {"logp": LOGP, "rollout_logp": OLD, "mask": MASK}
BALANCED = {"aggregation": "balanced", "advantages": R, "group_ids": GROUPS, "normalizer": 2.0, "mask": MASK}
OTB = {"logp": LOGP, "sum_pi_squared": X, "is_weights": X}
BOUNDS = {"eps_low": 0.1, "eps_high": 0.2, "scope": "batch", "lowest": 0.0, "highest": 1.0}
NODES = {"values": R, "parents": torch.tensor([-1, 0, 0])}
TOPK = {"logp_topk": LOGITS.log_softmax(-1), "old_logp_topk": LOGITS.log_softmax(-1), "mask": MASK}
OTHER_LOGITS, OTHER_HIDDEN, OTHER_WEIGHT = _draw(3, 5, 11), _draw(3, 5, 2), _draw(11, 2)
OTHER = {f"other_{name}": value for name, value in VOCABULARY.items()} | VOCABULARY
PAIR = {"logits": LOGITS, "other_logits": OTHER_LOGITS} | OTHER
HEADS = {"other_hidden": OTHER_HIDDEN, "other_weight": OTHER_WEIGHT, "other_bias": _draw(11)} | OTHER | HEAD
DISTILLED = TOKENS | {"token_weight": X, "aggregation": "token-mean", "normalizer": 2.0}
HIDDEN_REWARD = {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS, "correct": CORRECT, "group_ids": GROUPS, "mask": MASK}
TEACHER = {"logp": LOGP, "teacher_logp": OLD} | TOKENS
LISTS = {"logp_topk": LOGITS.log_softmax(-1), "other_logp_topk": OTHER_LOGITS.log_softmax(-1)}
SERVED = {"ids": IDS[..., None], "other_logp_topk": OLD[..., None], "topk_mask": MASK[..., None]}
TWO_HEADS = {"hidden": HIDDEN, "weight": WEIGHT, "other_hidden": OTHER_HIDDEN, "other_weight": OTHER_WEIGHT}
DPO = {"dpo_hidden": HIDDEN, "dpo_weight": WEIGHT, "other_hidden": OTHER_HIDDEN, "other_weight": OTHER_WEIGHT}
ROWS = {"row_mask": MASK, "memory_budget": 1 << 20}
SPANS = {"spans": torch.tensor([0, 0, -1]), "other_spans": torch.tensor([0, -1, 0]), "number": 1}
TEXTS = {"logits": LOGITS[0, :3], "other_logits": OTHER_LOGITS[0, :3]} | SPANS
PIECES = {
    "ids": torch.tensor([[0, -1], [2, 1]] * 5 + [[3, 4]]),
    "weights": torch.tensor([[0.9, 0.1]] * 11),
    "vocab": 11,
}
PAIRS = TOKENS | {"pairs": torch.tensor([[0, 1]])}
PREFERRED = {"objective": "tdpo1", "logp": LOGP, "ref_logp": OLD, "divergence": X} | PAIRS
REFERRED = {"objective": "tdpo1", "ids": IDS, "ref_hidden": OTHER_HIDDEN, "ref_weight": OTHER_WEIGHT} | PAIRS
LABELLED = {"objective": "kto", "logp": LOGP, "ref_logp": OLD, "desirable": CORRECT, "kl": 0.1} | TOKENS
MATCHED = {"matched": torch.tensor([1, 2]), "other_matched": torch.tensor([0, 3])}

CALLS = [
    (tokenrl.policy_loss, {"objective": "ppo", "logp": LOGP, "entropy": X} | LOSS),
    (tokenrl.linear_policy_loss, {"objective": "ppo", "ids": IDS} | HEAD | LOSS),
    (tokenrl.token_logprobs, {"logits": LOGITS, "ids": IDS, "row_mask": MASK} | VOCABULARY),
    (tokenrl.linear_token_logprobs, {"ids": IDS, "row_mask": MASK} | HEAD),
    (tokenrl.token_divergence, {"kind": "jsd", "row_mask": MASK} | PAIR),
    (tokenrl.linear_token_divergence, {"kind": "jsd", "row_mask": MASK} | HEADS),
    (tokenrl.distillation_loss, {"objective": "kd"} | PAIR | DISTILLED),
    (tokenrl.linear_distillation_loss, {"objective": "kd"} | HEADS | DISTILLED),
    (tokenrl.preference_loss, {"token_weight": X, "divergence_weight": X, "pair_weight": R[:1]} | PREFERRED),
    (tokenrl.preference_loss, {"pair_weight": R, "normalizer": 2.0} | LABELLED),
    (tokenrl.linear_preference_loss, {"token_weight": X, "divergence_weight": X} | HEAD | REFERRED),
    (preference_weights.wpo_weights, {"logp": LOGP, "log_sum_sq_probs": OLD} | PAIRS),
    (preference_weights.ld_dpo_weights, {"logp": LOGP, "alpha": 0.5} | PAIRS),
    (preference_weights.tgdpo_weights, {"aligned_logp": LOGP, "ref_logp": OLD} | PAIRS),
    (preference_weights.cdpo_weights, {"score": X} | PAIRS),
    (preference_weights.mapo_weights, {"activation": HIDDEN} | TOKENS),
    (preference_weights.tab_po_weights, {"weight": X} | TOKENS),
    (preference_weights.tab_po_barrier, {"logp": LOGP, "weight": X} | PAIRS),
    (preference_weights.t_reg_term, {"logp": LOGP, "better_logp": X, "worse_logp": OLD, "margins": R[:1]} | PAIRS),
    (preference_weights.sparsepo_l1, {"weight": X} | PAIRS),
    (preference_weights.mah_dpo_weights, {"dimension": GROUPS, "heads": 2}),
    (tokenrl.aggregation_weights, BALANCED), (tokenrl.group_aggregate, {"values": X} | BALANCED),
    (tokenrl.token_metrics, {"objective": "ctpo", "logp": LOGP, "old_logp": OLD, "advantages": R} | TOKENS),
    (tokenrl.prefix_ratio, {"logp": LOGP, "old_logp": OLD} | TOKENS),
    (tokenrl.position_adaptive_clip, {"log_ratio": X, "eps_low": 0.1, "eps_high": 0.1, "power": 0.5} | TOKENS),
    (tokenrl.entropy_mix, {"entropy": X, "lowest": 0.0, "highest": 1.0} | TOKENS),
    (tokenrl.topk_divergence, TOPK),
    (tokenrl.topk_distillation_loss, {"objective": "kd", "temperature": 2.0} | LISTS | DISTILLED),
    (tokenrl.topk_token_divergence, {"kind": "jsd", "topk_mask": LOGITS > -1, "row_mask": MASK} | LISTS),
    (tokenrl.linear_topk_distillation_loss, {"objective": "kd"} | SERVED | HEAD | DISTILLED),
    (tokenrl.topk_ids, {"logits": LOGITS, "k": 3} | ROWS),
    (tokenrl.linear_topk_ids, {"hidden": HIDDEN, "weight": WEIGHT, "bias": HEAD["bias"], "k": 3} | ROWS),
    (tokenrl.union_topk_ids, {"ids": IDS, "other_ids": IDS}),
    (tokenrl.combined_head, {"a": 1.0, "b": -0.5} | TWO_HEADS),
    (opd.teacher_advantages, {"advantages": R} | TEACHER), (opd.iw_opd_advantages, TEACHER),
    (opd.minillm_advantages, {"advantages": R} | TEACHER),
    (opd.kept_probability, {"logp": LOGP, "old_logp": OLD} | TOKENS),
    (self_distillation.rlsd_advantages, {"advantages": R} | TEACHER), (self_distillation.sdar_gate, TEACHER),
    (sft_weights.dft_weights, {"logp": LOGP} | TOKENS), (sft_weights.chord_weights, {"logp": LOGP} | TOKENS),
    (sft_weights.nll_weights, {"tokens": MASK, "coef": 0.1, "count": 3.0}),
    (m2po.m2po_threshold, MOVED | TOKENS), (m2po.m2po_mask, MOVED | TOKENS),
    (m2po.m2po_bounds, {"threshold": 0.2, "like": OLD}),
    (tokenrl.proximal_logp, {"logp": LOGP, "rollout_logp": OLD, "versions": IDS, "current_version": 9}),
    (group_losses.target_po_loss, GROUPED | {"scores": R}), (group_losses.gvpo_loss, GROUPED | {"advantages": R}),
    (group_losses.sppo_loss, {"logp": LOGP, "old_logp": OLD, "rewards": R} | TOKENS),
    (group_losses.a_star_po_loss, {"logp": LOGP, "ref_logp": OLD, "advantages": R} | TOKENS),
    (group_losses.flowrl_loss,
     {"logp": LOGP, "old_logp": OLD, "ref_logp": OLD, "rewards": R, "log_z": R, "normalizer": 3.0} | TOKENS),
    (advantages.maxrl, REWARDED), (advantages.soft_value, REWARDED), (advantages.opmd, REWARDED),
    (advantages.asymre, REWARDED), (advantages.rae, {"rewards": R, "agents": GROUPS, "baselines": R}),
    (sft_weights.chord_share, {"step": 3, "warm_up": 2, "decay": 4, "peak": 0.5, "valley": 0.0}),
    (akl.head_share, {"logits": LOGITS, "other_logits": OTHER_LOGITS} | ROWS),
    (akl.linear_head_share, TWO_HEADS | ROWS),
    (intro.candidates, {"logits": LOGITS, "ids": IDS, "n": 1} | ROWS),
    (intro.linear_candidates, {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS, "n": 1} | ROWS),
    (intro.log_weights, {"logp": LOGITS, "posterior_logp": OTHER_LOGITS}),
    (aligndistil.teacher_of, {"variant": "aligndistil", "dpo_logits": LOGITS, "other_logits": OTHER_LOGITS} | TOKENS),
    (aligndistil.linear_teacher_of, {"variant": "aligndistil", "memory_budget": 1 << 20} | DPO | TOKENS),
    (uld.span_probabilities, {"logits": LOGITS[0, :3], "ids": IDS[0, :3], "spans": SPANS["spans"], "number": 1}),
    (uld.sorted_l1, {"p": X, "other": X}), (uld.hybrid_uld, {"p": X, "other": X} | MATCHED),
    (xtoken.matched_ids, PIECES), (xtoken.h_kl, TEXTS | MATCHED),
    (xtoken.p_kl, TEXTS | {"projection": xtoken.sparse_projection(**PIECES)}),
    (advantages.grpo, SHARED), (advantages.rloo, SHARED), (advantages.gpg, SHARED), (advantages.pass_at_k, SHARED),
    (advantages.group_statistics, SHARED),
    (advantages.pama, {"advantages": X - 0.5}),
    (advantages.opo, {"lengths": LENGTHS} | SHARED),
    (advantages.remax, {"rewards": R, "greedy_rewards": R}),
    (advantages.gdpo, {"rewards": X, "group_ids": GROUPS, "weights": _draw(5), "lengths": LENGTHS}),
    (advantages.hapo, {"lengths": LENGTHS} | SHARED), (advantages.hapo_statistics, {"lengths": LENGTHS} | SHARED),
    (advantages.whiten, {"values": X, "mean": 0.0, "var": 1.0} | TOKENS),
    (advantages.discounted_returns, {"token_rewards": X} | TOKENS),
    (advantages.reinforce_plus_plus, {"token_rewards": X} | TOKENS),
    (advantages.reinforce_plus_plus_baseline, SHARED | TOKENS),
    (advantages.gae, {"token_rewards": X, "values": X} | TOKENS),
    (advantages.otb, {"token_rewards": X, "group_ids": GROUPS} | OTB | TOKENS),
    (advantages.tempo, {"ids": IDS} | SHARED | TOKENS),
    (advantages.spo_mask, {"old_logp": OLD} | TOKENS), (advantages.spo_cutpoints, {"old_logp": OLD} | TOKENS),
    (advantages.spo_chain, {"values": R[:, None], "rewards": R, "segment_ids": IDS * 0, "old_logp": OLD} | TOKENS),
    (advantages.spo_tree, NODES),
    (bounds.bandpo, {"old_logp": OLD} | TOKENS),
    (bounds.hapo_score, {"entropy": X} | TOKENS), (bounds.hapo_statistics, {"entropy": X} | TOKENS),
    (bounds.entropy_range, {"entropy": X, "segment_ids": IDS} | TOKENS),
    (bounds.entropy_bounds, {"entropy": X, "segment_ids": IDS} | BOUNDS | TOKENS),
    (bounds.segment_ids, {"ids": IDS, "delimiters": [4]} | TOKENS),
    (conflicts.conflict_weights, {"ids": IDS, "advantages": R, "group_ids": GROUPS} | TOKENS),
    (conflicts.conflict_lengths, {"ids": IDS, "advantages": R, "group_ids": GROUPS} | TOKENS),
    (conflicts.entropy_shaped_advantages, {"advantages": R, "entropy": X} | TOKENS),
    (corrections.importance_weights, {"high": 2.0} | POLICIES),
    (corrections.rejection_mask, {"statistic": "token_k1", "low": 0.5, "high": 2.0} | POLICIES),
    (corrections.off_policy_sequence_mask, {"advantages": R, "threshold": 0.5} | POLICIES),
    (corrections.top_entropy_mask, {"entropy": X} | TOKENS),
    (corrections.entropy_threshold, {"entropy": X, "quantile": 0.5} | TOKENS),
    (divergence_weights.tw_grpo_weights, {"logits": LOGITS, "group_ids": GROUPS} | TOKENS),
    (divergence_weights.linear_tw_grpo_weights, {"hidden": HIDDEN, "weight": WEIGHT, "group_ids": GROUPS} | TOKENS),
    (hidden_reward.thr, HIDDEN_REWARD), (hidden_reward.nthr, HIDDEN_REWARD),
    (hidden_reward.thr_threshold, {"thr": X, "correct": CORRECT, "group_ids": GROUPS} | TOKENS),
    (hidden_reward.thr_advantages, {"thr": X, "advantages": R, "p": 0.1, "tau": 0.5} | TOKENS),
    (hidden_reward.nthr_statistics, {"nthr": X, "correct": CORRECT, "group_ids": GROUPS} | TOKENS),
    (d3s.max_variance_rollouts, {"advantages": R, "keep": 2}),
    (d3s.advantage_entropy_mask, {"advantages": R, "entropy": X, "fraction": 0.5} | TOKENS),
    (d3s.advantage_entropy_mask, {"advantages": R, "entropy": X, "threshold": 0.5} | TOKENS),
    (d3s.advantage_entropy_threshold, {"advantages": R, "entropy": X, "fraction": 0.5} | TOKENS),
    (d3s.d3s_schedule, {"progress": 0.5, "initial": 4.0, "final": 2.0}),
    (rewards.rto, {"dpo_logp": LOGP, "ref_logp": OLD, "old_logp": OLD, "rewards": R} | TOKENS),
    (rewards.token_rewards, {"logp": LOGP, "ref_logp": OLD, "beta": 0.1} | TOKENS),
    (rewards.kl_estimate, {"logp": LOGP, "ref_logp": OLD} | TOKENS),
    (rewards.overlong_penalty, {"lengths": LENGTHS, "max_length": 6, "buffer": 2}),
    (rewards.overlong_mask, {"lengths": LENGTHS, "max_length": 6, "finished": CORRECT}),
    (rewards.length_reward, {"lengths": LENGTHS, "budget": 4, "r_max": 1.0}),
    (rewards.rmt_reward, {"correct": CORRECT, "length_rewards": R, "weight": 0.5}),
    (rewards.reasoning_budget, {"progress": 0.5}),
    (compat.selective_log_softmax, {"logits": LOGITS, "index": IDS, "row_mask": MASK}),
    (compat.selective_log_softmax_and_entropy, {"logits": LOGITS, "index": IDS, "row_mask": MASK}),
    (compat.entropy_from_logits, {"logits": LOGITS}),
    (compat.logprobs_from_logits, {"logits": LOGITS, "labels": IDS}),
]  # fmt: skip


def tensors(x):
    """What a call returns, as a list of tensors."""
    if isinstance(x, Metrics):
        return [x.raw]
    if isinstance(x, tokenrl.PreferenceMetrics | tokenrl.LinearPreferenceMetrics):
        return [x.margins, x.accuracy]  # the rewards of labelled sequences are NaN on the other side
    if isinstance(x, tokenrl.TokenMetrics):
        return [x.ratio, x.sequence_sums()]
    if isinstance(x, torch.Tensor):
        return [x]
    return [y for part in x for y in tensors(part)] if hasattr(x, "__iter__") else []


def kinds(function, name):
    """The types of an argument, as its annotation has them."""
    annotation = inspect.signature(function).parameters[name].annotation
    return typing.get_args(annotation) or (annotation,)


def arguments(*kind):
    """(function, the good arguments, the name of one of a kind), for every such argument with a value or a default."""
    for function, given in CALLS:
        for name, parameter in inspect.signature(function).parameters.items():
            known = name in given or parameter.default not in (None, parameter.empty)
            if known and kind == tuple(k for k in (Tensor, float) if k in kinds(function, name)):
                yield function, given, name
