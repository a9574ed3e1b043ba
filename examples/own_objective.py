"""An objective of your own: a gate in torch, of which tokenrl.fuse makes kernels, in a row registered by name.

On a CPU the kernel is C++, where there is a compiler, and with TRITON_INTERPRET=1 interpreted Triton too; on a GPU it
is Triton. A backend without one says why.

    python examples/own_objective.py
"""

import torch

import tokenrl
from tokenrl import parity
from tokenrl.ops import backends


@tokenrl.fuse
@tokenrl.parametrised
class SoftBand(tokenrl.Gate):
    """l = -A width tanh(s / width): the log ratio saturates smoothly, its gradient fades with the tanh's square."""

    name = "soft_band"
    width: float = 0.2

    def value(self, s, x, logp, advantages, t):
        return -advantages * self.width * torch.tanh(s / self.width)


# Any statistic will do: here the prefix sum of CTPO, with its gradient stopped in all tokens but the own one.
tokenrl.register(
    tokenrl.Objective("soft_ctpo", "prefix_sum", SoftBand(), "seq-mean-token-mean", "our own", flow="local", cap=10.0)
)


def gradient(backend: str, device: str) -> torch.Tensor:
    torch.manual_seed(0)
    logp = -torch.rand(4, 300, dtype=torch.float64) * 3
    old_logp = logp + 0.02 * torch.randn(4, 300, dtype=torch.float64)
    mask = torch.arange(300) < torch.tensor([[300], [180], [77], [1]])
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.5], dtype=torch.float64)
    logp = logp.to(device).requires_grad_()
    objective = tokenrl.objective("soft_ctpo", width=0.3)
    given = (x.to(device) for x in (old_logp, advantages))
    loss, metrics = tokenrl.policy_loss(objective, logp, *given, mask=mask.to(device), backend=backend)
    print(f"{backend}: loss {loss.item():.6f}, mean ratio {metrics.ratio_mean:.4f}")
    return torch.autograd.grad(loss, logp)[0].cpu()


device = "cuda" if torch.cuda.is_available() else "cpu"
truth = gradient("reference", device)
for name in ("cpu", "triton"):
    backend = backends.BACKENDS[name]
    if reason := backend.why_not(torch.device(device)) or backend.why_not_gate("soft_band"):
        print(f"no {name} here: {reason}")
    else:
        parity.close(gradient(name, device), truth, truth, what="gradient of soft_ctpo")
        print(f"the kernel of {name} has the gradient of the reference")
