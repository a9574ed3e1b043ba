"""How kernels are launched: the device, block sizes and warps."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

# A function is made for the interpreter or for a GPU when it is defined, by what TRITON_INTERPRET is then: ours now,
# those of Triton's language when Triton was imported.
INTERPRETED = triton.knobs.runtime.interpret
MADE_ALIKE = isinstance(tl.sum, triton.JITFunction) != INTERPRETED
FOR_NVIDIA = not INTERPRETED and torch.version.hip is None


# Arguments of kernels that differ from call to call: counts, and distances between rows. Of what is in a tuple Triton
# asks nevertheless.
COUNTS = (
    "time", "K", "parts", "rows", "n", "num_tokens", "num_sequences", "num_losses", "stride_batch", "stride_time",
    "keep_batch", "keep_time", "grad_batch", "grad_time", "other_batch", "other_time", "other_keep_batch",
    "other_keep_time",
)  # fmt: skip


def kernel(function):
    """A kernel that is compiled once for all of its COUNTS. Triton else asks of each whether it is 1 and whether 16
    divides it, and a run whose batches vary would have it compiled again and again, a second each. What 16 bytes divide
    the kernels are told by an option of their own."""
    return triton.jit(function, do_not_specialize=COUNTS)


def on_device_of(x: Tensor):
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


_TICKETS: dict[tuple[torch.device, int], Tensor] = {}


def ticket(x: Tensor) -> Tensor:
    """int32 [1], 0, as every launch leaves it: that of the current stream, whose kernels, one after another, need no
    second one."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return x.new_zeros(1, dtype=torch.int32)  # a graph may run on any stream
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    key = x.device, 0 if stream is None else stream.cuda_stream
    if key not in _TICKETS:
        _TICKETS[key] = _zero(x.device, stream)
    return _TICKETS[key]


def _zero(device: torch.device, stream) -> Tensor:
    """Made in a thread of its own: what this one allocates may belong to the pool of a graph that is only being warmed
    up, in which nothing may stay."""

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(1, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def token_block(num_tokens: int, num_sequences: int) -> int:
    """Tokens of a sequence per block: about the mean length; longer sequences are walked."""
    mean = triton.cdiv(num_tokens, max(num_sequences, 1))
    return min(max(triton.next_power_of_2(mean), 16 if INTERPRETED else 128), 512)


def block_of(statistic: str, num_tokens: int, num_sequences: int) -> int:
    """The same for all batches where tokens are added up, or the sums of a sequence would depend on the others."""
    if statistic == "token" or statistic.startswith("prefix_min"):
        return token_block(num_tokens, num_sequences)
    return 16 if INTERPRETED else 512


def token_warps(block: int) -> int:
    """Two tokens per thread: ten running sums per token fill the registers."""
    return max(block // 64, 1)


def multiprocessors(device: torch.device) -> int:
    """2 where there is no GPU: a single row is then split, as a few rows are on a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def vocab_parts(rows: int, vocab: int, device: torch.device) -> int:
    """Programs per row: more than one where rows alone would leave multiprocessors idle."""
    available = multiprocessors(device)
    return 1 if rows >= available else min(triton.cdiv(2 * available, rows), triton.cdiv(vocab, 1024))


def vocab_block(vocab: int, dtype: torch.dtype, parts: int = 1, heavy: bool = False) -> int:
    """Logits per block: 16 per thread on a GPU (8 in fp64), half of that where much is computed of each (heavy); the
    interpreter pays per operation, not per element.

    A part of a row is at least four blocks, or blocks would not spread evenly over the parts, until they are small."""
    most = 65536 if INTERPRETED else 1024 if heavy else 2048 if dtype == torch.float64 else 4096
    if parts > 1:
        most = min(most, max(1 << (vocab // (4 * parts)).bit_length() >> 1, 1024))
    return min(max(triton.next_power_of_2(vocab), 128), most)


def vocab_warps(block: int, per_thread: int) -> int:
    return min(max(block // (32 * per_thread), 1), 8)


def several_ids(per_row: int) -> dict:
    """Options of a kernel that counts for several ids at once: ptxas would rather spill than use so many registers."""
    return {"maxnreg": 176} if per_row > 1 and FOR_NVIDIA else {}
