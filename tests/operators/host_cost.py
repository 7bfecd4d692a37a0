"""What a call of tfl.lora_linear on mps costs the host: ``python -m tests.operators.host_cost``.

As the bench command measures it, on the emulator with execution off. Modelled: a Mac's own driver is not in it.
"""

import sys

import torch

from tests.emulator import mps_on_linux

MOST = {"no_grad": 4, "recording": 5}  # times F.linear


def main() -> int:
    mps_on_linux.install_with_extension()
    from torch_fused_lora.bench.measure import host_cost
    from torch_fused_lora.bench.report import host_cost_line

    torch.set_num_threads(1)
    with mps_on_linux.execution(enabled=False):
        costs = [host_cost(torch.device("mps"), mode) for mode in MOST]
    for cost in costs:
        print(f"{host_cost_line(cost)}, at most {MOST[cost.mode]}")
    return sum(cost.ratio.median > MOST[cost.mode] for cost in costs)


if __name__ == "__main__":
    sys.exit(main())
