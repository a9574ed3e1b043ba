"""GPUs and their published limits, for `tokenrl plan`: dense matrix products, without sparsity, at the boost clock."""

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9
EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor: CUDA programming guide, throughput of arithmetic instructions


@dataclass(frozen=True)
class Gpu:
    """memory, bytes; bandwidth, bytes/s; half (bf16, fp16; summed in fp32) and single (fp32, no TF32), flops/s; link,
    bytes/s to other GPUs in each direction; clock, Hz."""

    title: str
    memory: float
    bandwidth: float
    half: float
    single: float
    link: float
    multiprocessors: int
    clock: float
    source: str

    @property
    def exponentials(self) -> float:
        return EXPONENTIALS_PER_CLOCK * self.multiprocessors * self.clock


def _gpu(
    title: str, gigabytes: float, bandwidth: float, half: float, single: float, link: float, units: int, clock: float,
    source: str,
) -> Gpu:  # fmt: skip
    """GB, GB/s, TFLOP/s, GB/s, GHz, as data sheets have them."""
    return Gpu(
        title, gigabytes * GIGA, bandwidth * GIGA, half * TERA, single * TERA, link * GIGA, units, clock * GIGA, source
    )


_AMPERE, _HOPPER = "NVIDIA A100 data sheet", "NVIDIA H100 data sheet"
_ADA, _RTX = "NVIDIA Ada GPU architecture whitepaper", "NVIDIA RTX Blackwell GPU architecture whitepaper"
GPUS = {
    "a100-40gb": _gpu("A100 SXM 40 GB", 40, 1555, 312, 19.5, 300, 108, 1.41, _AMPERE),
    "a100-80gb": _gpu("A100 SXM 80 GB", 80, 2039, 312, 19.5, 300, 108, 1.41, _AMPERE),
    "h100-sxm": _gpu("H100 SXM", 80, 3350, 989.4, 66.9, 450, 132, 1.98, _HOPPER),
    "h100-pcie": _gpu("H100 PCIe", 80, 2000, 756, 51.2, 300, 114, 1.755, _HOPPER),
    "h200": _gpu("H200 SXM", 141, 4800, 989.4, 66.9, 450, 132, 1.98, "NVIDIA H200 data sheet"),
    "b200": _gpu("B200", 180, 8000, 2250, 75, 900, 148, 1.85, "NVIDIA DGX B200 data sheet"),
    "l40s": _gpu("L40S", 48, 864, 362, 91.6, 32, 142, 2.52, "NVIDIA L40S data sheet"),
    "l4": _gpu("L4", 24, 300, 121, 30.3, 32, 58, 2.04, "NVIDIA L4 data sheet"),
    "rtx-4090": _gpu("GeForce RTX 4090", 24, 1008, 165.2, 82.6, 32, 128, 2.52, _ADA),
    "rtx-5090": _gpu("GeForce RTX 5090", 32, 1792, 209.5, 104.8, 64, 170, 2.407, _RTX),
}
