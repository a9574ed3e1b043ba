"""The golden cases of losses as parameters of a test, and what is read from one."""

import pytest
from cases import backends_to_test, device_of, thinned
from golden_data import INDEX

DETACHED = (  # test_golden_detached.py
    "verl_gpg", "verl_reinforce", "verl_dro", "verl_dppo_tv", "verl_dppo_kl", "dppo_official", "trl_luspo", "trl_vespo",
)  # fmt: skip


def grid(*families):
    """(family, case, backend)."""
    return [
        pytest.param(family, case, backend, id=f"{case}-{backend}")
        for backend in backends_to_test()
        for family in families
        for case in thinned(list(INDEX[family]["cases"]), backend)
    ]


def weight(x, like):
    return x["is_weights"].expand_as(like).contiguous() if "is_weights" in x else None


def leaf(x, backend):
    x = {name: value.to(device_of(backend)) for name, value in x.items()}
    name = "logp" if "logp" in x else "loss_mat"
    x[name].requires_grad_()
    return x, x[name]
