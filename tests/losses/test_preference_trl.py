"""preference_loss beside TRL's own losses, called with stand-ins for its models, in fp32."""

import collections
from types import SimpleNamespace

import pytest
import torch

import tokenrl
from tokenrl import preference_weights

trl = pytest.importorskip("trl", reason="trl is not installed (make test installs it)")

from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.experimental.tpo import TPOTrainer  # noqa: E402

PAIRS, T, V = 5, 11, 13


def batch(rows=2 * PAIRS):
    """(logp, ref_logp, log_sum_sq_probs, completion mask, one wider); zeros in masked cells, as of TRL's head."""
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, T, (rows, 1), generator=g)
    mask = torch.arange(T + 1) <= lengths
    mask[:, 0] = False  # the prompt
    values = [-2 * torch.rand(rows, T, generator=g) for _ in range(3)]
    return *(torch.where(mask[:, 1:], x, 0.0) for x in values), mask


class Model(torch.nn.Module):
    """Gives what it was made with."""

    is_gradient_checkpointing = False

    def __init__(self, logp, log_sum_sq_probs):
        super().__init__()
        self.made = logp, log_sum_sq_probs

    def forward(self, **_):
        logp, log_sum_sq_probs = self.made
        nothing = torch.zeros_like(logp)
        return SimpleNamespace(
            log_probs=logp, log_sum_sq_probs=log_sum_sq_probs, entropy=nothing, mean_logits=nothing,
            is_top1=nothing.bool(), logits=logp,
        )  # fmt: skip


def trainer(kind, models, **given):
    """A trainer without what trains."""
    made = object.__new__(kind)
    same = lambda x: x  # noqa: E731
    defaults = {
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)), "_total_train_tokens": 0,
        "_tp_size": 1, "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": False, "beta": 0.1,
        "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0,
        "use_weighting": False, "model": models[0], "ref_model": models[-1],
    }  # fmt: skip
    made.__dict__.update(defaults | given)
    return made


def rows_of(mask):
    return {"input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long()}


def alike(ours, theirs, leaf, mask=None):
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    found, expected = (torch.autograd.grad(x, leaf)[0] for x in (ours, theirs))
    assert expected.any()
    expected = expected if mask is None else torch.where(mask, expected, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())


KINDS = {
    "sigmoid": "dpo", "hinge": "dpo_hinge", "ipo": "ipo", "exo_pair": "exo", "nca_pair": "nca", "robust": "dpo_robust",
    "bco_pair": "bco", "sppo_hard": "sppo", "aot": "aot", "aot_unpaired": "aot_unpaired", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "discopop": "discopop", "sigmoid_norm": "dpo_norm",
}  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
DIVERGENCES = [
    ("sigmoid", "forward_kl", "dpo_forward_kl", {}),
    ("sigmoid", "js_divergence", "dpo_js", {}),
    ("sigmoid", "alpha_divergence", "dpo_alpha", {"alpha": 0.3}),
    ("ipo", "js_divergence", "dpo_js", {"statistic": "mean", "link": tokenrl.PREFERENCES["ipo"].link}),
    ("sigmoid_norm", "forward_kl", "dpo_forward_kl", {"statistic": "mean"}),
    ("hinge", "js_divergence", "dpo_js", {"link": tokenrl.PREFERENCES["dpo_hinge"].link}),
]
CASES = [(kind, "reverse_kl", row, {"label_smoothing": 0.1} if kind in SMOOTHED else {}) for kind, row in KINDS.items()]


EVERY = CASES + DIVERGENCES
GRID = [
    *((*case, {}) for case in EVERY), *((*case, {"ld_alpha": 0.4}) for case in EVERY),
    # Sorted margins belong to no pair: weights of pairs are refused there. Of TRL's hinge they have no backward, as it
    # multiplies the result of relu in place.
    *((*case, {"use_weighting": True}) for case in EVERY if case[0] not in ("aot", "aot_unpaired", "hinge")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "divergence", "row", "parameters", "more"), GRID, ids=str)
def test_dpo(kind, divergence, row, parameters, more):
    logp, ref_logp, squares, mask = batch()
    logp.requires_grad_()
    models = Model(logp, squares), Model(ref_logp, squares)
    theirs = trainer(
        trl.DPOTrainer, models, loss_types=[kind], loss_weights=[1.0], f_divergence_type=divergence, **more,
        label_smoothing=parameters.get("label_smoothing", 0.0), f_alpha_divergence_coef=parameters.get("alpha", 1.0),
    )._compute_loss(models[0], rows_of(mask), False)  # fmt: skip
    own, answers = {}, mask[:, 1:]
    if "ld_alpha" in more:
        own["token_weight"] = preference_weights.ld_dpo_weights(logp, alpha=0.4, mask=answers)
    if "use_weighting" in more:
        own["pair_weight"] = preference_weights.wpo_weights(logp, squares, mask=answers)
    ours, metrics = tokenrl.preference_loss(tokenrl.preference(row, **parameters), logp, ref_logp, mask=answers, **own)
    alike(ours, theirs, logp, answers)
    assert metrics.margins.shape == (PAIRS,)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(kind, weights):
    logp, ref_logp, squares, mask = batch()
    logp.requires_grad_()
    models = Model(logp, squares), Model(ref_logp, squares)
    labels = torch.arange(2 * PAIRS) % 3 != 0
    kl_logp = dict(zip(models, (torch.linspace(-3, -1, 6), torch.linspace(-4, -2, 6)), strict=True))
    given = trainer(
        trl.KTOTrainer, models, loss_type=kind, calculate_KL=kind == "kto", desirable_weight=weights[0],
        undesirable_weight=weights[1], _compute_kl_logps=lambda model, _: kl_logp[model],
    )  # fmt: skip
    theirs = given._compute_loss(models[0], rows_of(mask) | {"label": labels}, False)
    row = tokenrl.preference(kind, desirable_weight=weights[0], undesirable_weight=weights[1])
    kl = kl_logp[models[0]] - kl_logp[models[1]] if kind == "kto" else None
    ours, metrics = tokenrl.preference_loss(row, logp, ref_logp, mask=mask[:, 1:], desirable=labels, kl=kl)
    alike(ours, theirs, logp, mask[:, 1:])
    logged = given._metrics["train"]
    for side, rewards in (("chosen", metrics.chosen_rewards), ("rejected", metrics.rejected_rewards)):
        assert rewards.nanmean().item() == pytest.approx(logged[f"rewards/{side}"][0], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "row", "parameters"),
    [
        ("sigmoid", "cpo", {"label_smoothing": 0.1}), ("hinge", "slic", {}), ("ipo", "ipo", {"reference": "none"}),
        ("simpo", "simpo", {"gamma": 0.4, "label_smoothing": 0.1}), ("simpo", "alphapo", {"alpha": 0.3}),
        ("orpo", "orpo", {}),
    ],
)  # fmt: skip
def test_cpo_and_orpo(kind, row, parameters):
    """Of the log-probs of sequences, without the NLL term that both add."""
    logp, _, _, mask = batch()
    logp.requires_grad_()
    answers, row = mask[:, 1:], tokenrl.preference(row, beta=0.7, nll=0.0, **parameters)
    scores = logp.sum(1) / (answers.sum(1) if row.statistic == "mean" else 1)
    if kind == "orpo":
        losses = -trainer(ORPOTrainer, [None], beta=0.7).odds_ratio_loss(*scores.chunk(2))[0]
    else:
        given = trainer(
            CPOTrainer, [None], beta=0.7, loss_type=kind, alpha=parameters.get("alpha", 0.0),
            simpo_gamma=getattr(row.link, "gamma", 0.0), label_smoothing=getattr(row.link, "label_smoothing", 0.0),
        )  # fmt: skip
        losses = given.cpo_loss(*scores.chunk(2))[0]
    alike(tokenrl.preference_loss(row, logp, mask=answers)[0], losses.mean(), logp, answers)


@pytest.mark.parametrize(("kind", "row"), [("sigmoid", "tpo"), ("tpo-l", "tpo_l")])
def test_tpo(kind, row):
    g = torch.Generator().manual_seed(6)
    mask = batch(3 * PAIRS)[-1]
    logits = torch.randn(3 * PAIRS, T + 1, V, generator=g).requires_grad_()
    ids = torch.randint(V, mask.shape, generator=g)
    model = Model(logits, None)
    given = trainer(TPOTrainer, [model], loss_type=kind, beta=0.3, tpo_alpha=0.8, tpo_l_gamma=0.5, label_smoothing=0.1)
    theirs = given._compute_loss(model, rows_of(mask) | {"input_ids": ids}, False)
    logp = tokenrl.token_logprobs(logits[:, :-1], ids[:, 1:], outputs=["logp"]).logp
    answers, gold = mask[:, 1:], mask[:, 1:].clone()
    gold[: 2 * PAIRS] = False
    pairs = torch.arange(2 * PAIRS).view(2, PAIRS).t()
    ours, _ = tokenrl.preference_loss(
        tokenrl.preference(row, beta=0.3, nll=0.8, label_smoothing=0.1), logp, mask=answers, pairs=pairs, nll_mask=gold
    )
    alike(ours, theirs, logits)
