"""What an argument must be: check_* raises, as_* converts what it has checked."""

import math
import numbers
import sys
from collections.abc import Collection

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import described, unknown, wrong

FLOATS = (torch.float32, torch.float64)
PLAIN = (Tensor, torch.nn.Parameter)
UNSCORED = ("raise", "nan")
FINITE = sys.float_info.max
FP32 = torch.finfo(torch.float32)


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        remedy = f"{name}.weight" if isinstance(x, torch.nn.Module) else f"torch.as_tensor({name})"
        raise wrong(name, described(x), f"a torch.Tensor ({remedy})")
    # The kernels read memory of their own process: of a DTensor that is a shard.
    if type(x) not in PLAIN and (placements := getattr(x, "placements", None)):
        raise wrong(name, f"a DTensor, {placements}", f"a plain tensor ({name}.full_tensor(), which carries gradients)")


def check_name(name: str, x: object, accepted: Collection[str]) -> None:
    if not isinstance(x, str) or x not in accepted:
        raise unknown(name, x, accepted)


def values_known(x: Tensor) -> bool:
    """Whether a check may read the values of x: on a GPU that were a sync, in a trace there are none."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and not isinstance(x, FakeTensor)


def made_in_inference_mode(x: Tensor) -> bool:
    """Whether autograd, which is on again, may not save x. A trace cannot ask."""
    return not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled()


def as_saved(x: Tensor) -> Tensor:
    """x, or a copy of what was made in inference mode."""
    return x.clone() if made_in_inference_mode(x) else x


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy, as kernels read rows: even without rows, where .contiguous() is content with any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.clone(memory_format=torch.contiguous_format)


def check_integers(name: str, x: Tensor) -> None:
    """Ids are compared for equality: floats would be cut to integers, and different ids would meet."""
    check_tensor(name, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise wrong(name, f"dtype {x.dtype}", "integers (int64)")


def check_constant(name: str, x: Tensor) -> None:
    """Only log-probs and the values of a loss get gradients; in silence any other would get none."""
    check_tensor(name, x)
    if x.requires_grad:
        raise wrong(name, "a tensor that requires grad", f"a constant ({name}.detach()); it gets no gradient")


def check_floats(name: str, x: Tensor) -> None:
    """Log-probs and everything derived from them are fp32 or fp64: a bf16 ratio is noise."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise wrong(
            name, f"dtype {x.dtype}", "float32 or float64 (compute log-probs in fp32: tokenrl.token_logprobs does)"
        )


def as_float64(name: str, x: Tensor, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """fp64 of a checked argument; integers are refused, as half of them are counts or masks in the wrong place."""
    check_constant(name, x)
    if x.dtype not in FLOATS:
        raise wrong(name, f"dtype {x.dtype}", f"float32 or float64 ({name}.float())")
    if tuple(x.shape) != tuple(shape):
        raise wrong(name, f"shape {list(x.shape)}", f"shape {list(shape)}")
    if x.device != like.device:
        raise wrong(name, f"device {x.device}", f"the device of the rewards, {like.device}")
    return x.double()


def as_rewards(rewards: Tensor, name: str = "rewards", dims: str = "[S]", unscored: str = "nan") -> Tensor:
    check_tensor(name, rewards)
    if rewards.dim() != dims.count(",") + 1 or (rewards.dim() == 2 and rewards.shape[1] == 0):
        raise wrong(name, f"shape {list(rewards.shape)}", f"{dims}, a row per sequence")
    check_scored(name, rewards, unscored)
    return as_float64(name, rewards, rewards.shape, rewards)


def check_scored(name: str, x: Tensor, unscored: str) -> None:
    """A NaN is a reward that nobody gave; on a GPU, where a look at it were a sync, it shows in the result."""
    check_name("unscored", unscored, UNSCORED)
    if unscored == "raise" and values_known(x) and (count := x.isnan().sum()):
        raise wrong(name, f"NaN in {count} places", "numbers, or unscored='nan' for statistics of the others alone")


def as_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    check_integers("lengths", lengths)
    if values_known(lengths) and (lengths < 0).any():
        raise wrong("lengths", f"{lengths.min()} in the tensor", "numbers of tokens, at least 0")
    return as_float64("lengths", lengths.double(), x.shape[:1], x)


def as_scalar(name: str, x: float | Tensor, like: Tensor) -> Tensor:
    """A number or 0-d tensor, 0-d, of the dtype of `like`."""
    if isinstance(x, Tensor):
        check_constant(name, x)
        if x.numel() != 1:
            raise wrong(name, f"a tensor of shape {list(x.shape)}", "a number or a 0-d tensor")
    else:
        check_number(name, x)
    return torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(())


def is_number(x: object) -> bool:
    """Python's and numpy's alike; a bool is none, and a string that YAML made of 3e-4 neither."""
    return isinstance(x, (int, float, numbers.Real)) and not isinstance(x, bool)


def check_number(
    name: str, x: object, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf,
    accepted: str | None = None,
) -> None:  # fmt: skip
    """A number in [least, most], where `above` is given one above it; accepted: what an error says of them."""
    if not is_number(x):
        remedy = f" ({name}.item())" if isinstance(x, Tensor) else ""
        raise wrong(name, described(x), (accepted or "a number") + remedy)
    if least <= x <= most and (above == -math.inf or x > above):  # type: ignore[operator]  # false for nan too
        return
    if accepted is None:
        accepted = "a number"
        if above > -math.inf:
            accepted = f"a number above {above:g}" + (f", at most {most:g}" if most < math.inf else "")
        elif least > -math.inf:
            accepted = f"a number, at least {least:g}" if most == math.inf else f"a number in [{least:g}, {most:g}]"
    raise wrong(name, x, accepted)


def check_whole(name: str, x: object, least: int) -> None:
    """A whole number of things, at least so many; 4.0 is one."""
    accepted = f"a whole number, at least {least}"
    check_number(name, x, least, accepted=accepted)
    if not float(x).is_integer():  # type: ignore[arg-type]  # an infinite one is none
        raise wrong(name, x, accepted)


def check_positive(name: str, x: object) -> None:
    """A factor of logits; its inverse must not overflow where they are fp32."""
    check_number(name, x, FP32.tiny, FP32.max, accepted="a positive finite number in the range of fp32")


def check_bytes(name: str, x: object) -> None:
    if not isinstance(x, int) or isinstance(x, bool) or x <= 0:
        given = described(x) if type(x) is not int else x
        raise wrong(name, given, f"a positive number of bytes, as an integer (int({name}))")
