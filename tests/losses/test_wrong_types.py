"""Values of a wrong type, in any argument of any public function: the error names it, in one short line."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from front_calls import CALLS, HIDDEN, IDS, LOGITS, LOGP, MASK, OLD, WEIGHT, R, arguments

import tokenrl
from tokenrl import advantages


def named(function, given, name, **changes):
    with pytest.raises(ValueError) as error:
        function(**given | changes)
    text = str(error.value)
    assert text.startswith(f"{name}: got ") and ", accepted: " in text and len(text) < 500 and "\n" not in text, text
    return text


def id_of(case):
    return case.__name__ if callable(case) else case if isinstance(case, str) else ""


@pytest.mark.parametrize("function,given", CALLS, ids=id_of)
def test_the_call_is_good(function, given):
    function(**given)


OF_OTHERS = ("delimiters", "projection")  # a list, too; and no list, as it is sparse
TENSORS = [case for case in arguments(torch.Tensor) if case[2] in case[1] and case[2] not in OF_OTHERS]


@pytest.mark.parametrize("function,given,name", TENSORS, ids=id_of)
def test_what_is_no_tensor_is_named(function, given, name):
    for value, kind in (
        (given[name].tolist(), "a list"),
        (given[name].numpy(), "a numpy.ndarray of "),
        (1.0, "1.0, a float"),
    ):
        text = named(function, given, name, **{name: value})
        assert f"got {kind}" in text and f"a torch.Tensor (torch.as_tensor({name}))" in text


NUMBERS = [case for kind in ((float,), (torch.Tensor, float)) for case in arguments(*kind)]


@pytest.mark.parametrize("function,given,name", NUMBERS, ids=id_of)
def test_what_is_no_number_is_named(function, given, name):
    for value in ("3e-4", float("nan"), [1.0], True):
        named(function, given, name, **{name: value})


@pytest.mark.parametrize("number", [np.float32(0.75), np.float64(0.75), np.int64(1), 1])
def test_a_number_of_numpy_is_a_number(number):
    logp = tokenrl.token_logprobs(LOGITS, IDS, temperature=number, logit_scale=number, softcap=number).logp
    assert torch.equal(
        logp,
        tokenrl.token_logprobs(
            LOGITS, IDS, temperature=float(number), logit_scale=float(number), softcap=float(number)
        ).logp,
    )
    for backend in ("cpu", "reference"):
        row = tokenrl.objective("ppo", eps_low=number, clamp=number, cap=number)
        same = tokenrl.objective("ppo", eps_low=float(number), clamp=float(number), cap=float(number))
        found, expected = (
            tokenrl.policy_loss(x, LOGP, OLD, R, kl_coef=k, ref_logp=OLD, normalizer=k, backend=backend)[0]
            for x, k in ((row, number), (same, float(number)))
        )
        assert torch.equal(found, expected)


PARAMETERS = [(n, p) for n, row in tokenrl.OBJECTIVES.items() for part in row.parts.values() for p in part.names]


@pytest.mark.parametrize("name,parameter", [*PARAMETERS, ("ppo", "clamp"), ("ppo", "cap")])
def test_a_parameter_of_a_wrong_type_is_named(name, parameter):
    for value in ("3e-4", np.float32("nan"), [1.0], float("nan")):
        named(tokenrl.objective, {"name": name}, parameter, **{parameter: value})


def policy_loss(**changes):
    return {"objective": "ppo", "logp": LOGP, "old_logp": OLD, "advantages": R} | changes


def of_logits(**changes):
    return {"logits": LOGITS, "ids": IDS} | changes


def packed(boundaries):
    flat = LOGP.view(-1)
    return {"objective": "ppo", "logp": flat, "old_logp": flat, "advantages": R, "cu_seqlens": boundaries}


LENGTH = 200_000
LONG = {"objective": "ppo", "logp": torch.zeros(LENGTH), "old_logp": None, "advantages": torch.ones(LENGTH)}
OTHERS = [
    ("advantages", "1.0, a float", tokenrl.policy_loss, policy_loss(advantages=1.0)),
    ("cu_seqlens", "a list", tokenrl.policy_loss, packed([0, 5, 10, 15])),
    ("cu_seqlens", "a numpy.ndarray of int64", tokenrl.policy_loss, packed(np.array([0, 5, 10, 15]))),
    ("cu_seqlens", "...", tokenrl.policy_loss, LONG | {"cu_seqlens": torch.arange(LENGTH)}),
    ("kl", "'k3'", tokenrl.policy_loss, policy_loss(kl="k3", ref_logp=OLD, kl_coef=0.1)),
    ("kl", "['kl_k3']", tokenrl.policy_loss, policy_loss(kl=["kl_k3"], ref_logp=OLD, kl_coef=0.1)),
    ("kl_coef", "None", tokenrl.policy_loss, policy_loss(kl_coef=None)),
    ("correction", "'cap'", tokenrl.policy_loss, policy_loss(rollout_logp=OLD, correction={"cap": 2.0})),
    ("correction", "'tis', a str", tokenrl.policy_loss, policy_loss(rollout_logp=OLD, correction="tis")),
    ("low", "'1'", tokenrl.policy_loss, policy_loss(rollout_logp=OLD, correction={"high": 2.0, "low": "1"})),
    ("objective", "a torch.Tensor of", tokenrl.policy_loss, policy_loss(objective=LOGP)),
    ("aggregation", "['token-mean']", tokenrl.policy_loss, policy_loss(aggregation=["token-mean"])),
    ("gate", "'sapo', a str", tokenrl.objective, {"name": "ppo", "gate": "sapo"}),
    ("form", "'gmpo', a str", tokenrl.objective, {"name": "ppo", "form": "gmpo"}),
    ("clamp", "None", tokenrl.objective, {"name": "ppo", "clamp": None}),
    ("temperature", "1e-40", tokenrl.token_logprobs, of_logits(temperature=1e-40)),
    ("temperature", "inf in the tensor", tokenrl.token_logprobs, of_logits(temperature=torch.full((3, 5), torch.inf))),
    ("softcap", "a torch.Tensor of torch.float32 []", tokenrl.token_logprobs, of_logits(softcap=torch.tensor(30.0))),
    ("outputs", "'logp', a str", tokenrl.token_logprobs, of_logits(outputs="logp")),
    ("outputs", "a generator", tokenrl.token_logprobs, of_logits(outputs=(name for name in ("logp",)))),
    ("outputs", "['logp', 'logp']", tokenrl.token_logprobs, of_logits(outputs=("logp", "logp"))),
    ("ignore_index", "None", tokenrl.token_logprobs, of_logits(ignore_index=None)),
    ("ids", "values from -100 to", tokenrl.token_logprobs, of_logits(ids=IDS - 101, ignore_index=0)),
    ("row_mask", "device meta", tokenrl.token_logprobs, of_logits(row_mask=MASK.to("meta"))),
    ("weight", "a torch.nn.modules.linear.Linear", tokenrl.linear_token_logprobs,
     {"hidden": HIDDEN, "weight": torch.nn.Linear(4, 11), "ids": IDS}),
    ("memory_budget", "1000000000.0, a float", tokenrl.linear_token_logprobs,
     {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS, "memory_budget": 1e9}),
    ("lengths", "-1 in the tensor", advantages.opo,
     {"rewards": R, "lengths": torch.tensor([1, -1, 2]), "group_ids": torch.tensor([0, 0, 1])}),
    ("eps", "-1.0", advantages.grpo, {"rewards": R, "group_ids": torch.tensor([0, 0, 1]), "eps": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize("name,got,function,given", OTHERS, ids=id_of)
def test_other_wrong_values_are_named(name, got, function, given):
    assert got in named(function, given, name)


def test_the_variable_that_names_a_backend_is_named():
    code = "import torch, tokenrl; tokenrl.policy_loss('ppo', torch.zeros(1, 1), None, torch.ones(1))"
    environment = os.environ | {"TOKENRL_BACKEND": "CPU"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].startswith("ValueError: TOKENRL_BACKEND, the environment's backend: got 'CPU'")
