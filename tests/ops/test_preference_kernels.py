"""The kernels of preferences against the fp64 reference, and the same bits whatever lies around a sequence."""

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, kernel_backends, thinned
from preference_cases import P, T, batch

import tokenrl
from tokenrl.instruments.parity import close

LEAVES = ("logp", "divergence", "token_weight", "divergence_weight")
KERNELS = kernel_backends()


def results(name, case, backend, dtype=torch.float64, **more):
    """Loss, metrics and the gradients of all leaves, by name, on the CPU."""
    made = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in (case | more).items()}
    made = {key: x.to(device_of(backend)) if torch.is_tensor(x) else x for key, x in made.items()}
    sorts = tokenrl.PREFERENCES[name].coupling == "sorted_margins"
    leaves = {key: made[key] for key in LEAVES if key in made and not (sorts and key == "token_weight")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss, metrics = tokenrl.preference_loss(name, **made, backend=backend)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"loss": loss, **metrics._asdict(), **dict(zip(leaves, grads, strict=True))}
    return {key: x.detach().cpu() for key, x in found.items()}


def poisoned(x, mask):
    return torch.where(mask, x, torch.nan)


def whole(name, packed):
    """A batch with everything that the row takes, NaN where no token counts; packed: in sequences of many lengths."""
    row, case, g = tokenrl.PREFERENCES[name], batch(name), torch.Generator().manual_seed(3)
    case["token_weight"] = torch.rand(2 * P, T, generator=g) + 0.2
    if row.divergence:
        case["divergence_weight"] = torch.rand(2 * P, T, generator=g) + 0.2
    if row.nll:
        case["nll_mask"] = case["mask"].roll(2, 0) & case["mask"]
    for key in (*LEAVES, "ref_logp"):
        if key in case:
            case[key] = poisoned(case[key], case["mask"])
    if row.coupling == "pairs":
        case |= {"pairs": torch.tensor([[0, 3], [4, 1], [5, 2]]), "pair_weight": torch.tensor([0.5, 1.0, 2.0])}
    if packed:
        case = {key: x.flatten() if x.shape == (2 * P, T) else x for key, x in case.items()}
        case["cu_seqlens"] = torch.tensor([0, 5, 14, 21, 26, 34, 2 * P * T])
    return case


@pytest.mark.parametrize(
    "name,packed,backend",
    [(name, k % 2 == 1, b) for b in KERNELS for k, name in enumerate(thinned(list(tokenrl.PREFERENCES), b))],
)
def test_every_row_by_the_tolerance_rule(name, packed, backend):
    case = whole(name, packed)
    truth, base = (results(name, case, "reference", dtype) for dtype in (torch.float64, torch.float32))
    found = results(name, case, backend, torch.float32)
    assert truth["logp"].any()
    for key, value in found.items():
        close(value, truth[key], base[key], f"{name} {key}")


def padded(case, width):
    pads = {torch.bool: False}
    return {
        key: torch.nn.functional.pad(x, (0, width), value=pads.get(x.dtype, torch.nan)) if x.shape == (2 * P, T) else x
        for key, x in case.items()
    }


@pytest.mark.parametrize("name", ["tdpo2", "kto"])
@pytest.mark.parametrize("backend", KERNELS)
def test_padding_and_threads_change_no_bit(name, backend):
    case = whole(name, packed=False)
    expected = results(name, case, backend, torch.float32)
    for width in (1, 9) if interpreted(backend) else (1, 9, 64, 1001):
        found = results(name, padded(case, width), backend, torch.float32)
        for key in LEAVES:
            if key in found:
                assert not found[key][:, T:].any()
                found[key] = found[key][:, :T]
        assert all(torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in found), width


@pytest.mark.parametrize("backend", KERNELS)
def test_the_batch_changes_no_bit_of_a_sequence(backend):
    """Beside others a pair has the margins that it has alone, and its gradients but for the number of pairs."""
    case = whole("dpo", packed=False)
    expected = results("dpo", case, backend, torch.float32, normalizer=1.0)
    for k, (won, lost) in enumerate(case["pairs"]):
        rows = torch.stack([won, lost])
        alone = {key: x[rows] for key, x in case.items() if x.shape == (2 * P, T)}
        found = results("dpo", alone | {"pair_weight": case["pair_weight"][k : k + 1]}, backend, torch.float32)
        assert torch.equal(found["margins"], expected["margins"][k : k + 1])
        for key in ("logp", "token_weight"):
            assert torch.equal(found[key], expected[key][rows])


def test_the_number_of_threads_changes_no_bit():
    if "cpu" not in KERNELS:
        pytest.skip("no kernels of the CPU")
    g, threads, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    case = {"logp": -torch.rand(64, 3000, generator=g), "ref_logp": -torch.rand(64, 3000, generator=g)}
    case["mask"] = torch.rand(64, 3000, generator=g) > 0.2
    for count in (1, 2, 3):
        try:
            torch.set_num_threads(count)
            found.append(results("dpo", case, "cpu", torch.float32))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one[key], found[0][key]) for one in found for key in one)


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", ["dpo", "aot", "kto"])
def test_no_pair_at_all(name, backend):
    case = {key: x[:0] if x.shape[0] == 2 * P else x for key, x in batch(name).items()}
    found = results(name, case, backend)
    assert found["loss"] == 0 and found["logp"].shape == (0, T)
