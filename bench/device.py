"""python -m bench.device: the GPU, the build, the backends' reasons, and registers and occupancy of every kernel."""

import torch

from tokenrl import _bindings
from tokenrl.ops import backends


def main() -> None:
    print(torch.cuda.get_device_name(), _bindings.build_info())
    print(backends.reasons(torch.device("cuda")))
    for kernel in _bindings.kernel_attributes():
        print(kernel)


if __name__ == "__main__":
    main()
