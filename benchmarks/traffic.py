"""Operations and bytes of operands of a batch of mixtures, counted from shapes: python -m benchmarks.traffic.

Nothing is computed and no GPU is needed. Every operand of an operation counts once as read or written, as if no cache
held it and nothing were fused; over a GPU's bandwidth that is the least time of eager kernels, those of
simulator.fused=false. Views count nothing.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.bench_simulate import RIR, SAMPLES
from ssl_gpu import runtime
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.simulator import Simulator, SimulatorConfig


class Traffic(TorchDispatchMode):
    """Counts calls and bytes by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and not function.is_view and not name.startswith(("_unsafe_view", "empty")):
            operands = [x for x in tree_leaves((arguments, keywords, result)) if isinstance(x, torch.Tensor)]
            self.add(name, operands)
        return result

    def add(self, name: str, operands: Sequence[torch.Tensor]) -> None:
        """Counts one operation."""
        self.calls[name] += 1
        # An expanded tensor is read from what it has in memory.
        self.bytes[name] += sum(min(x.untyped_storage().nbytes(), x.nbytes) for x in operands)


def count(scenes: int) -> Traffic:
    """Of one call of the Simulator under the default law, eager, in one chunk of all scenes, and at once, as on a
    GPU."""
    simulator, generator = Simulator(rir=RIR, config=SimulatorConfig(scenes)), common.generator(torch.device("cpu"))
    traffic = Traffic()
    with patch.object(runtime, "prefers_parts", lambda device: False):
        simulator(torch.zeros(1, 2, SAMPLES), generator=generator)  # tables are made once, and must not be fakes
        with FakeTensorMode(allow_non_fake_inputs=True), traffic:
            simulator(torch.zeros(scenes, 2, SAMPLES), generator=generator)
    return traffic


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.traffic", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--scenes", type=common.positive, default=512, help="in one chunk (default 512)")
    args = parser.parse_args(arguments)
    traffic = count(args.scenes)
    print(f"{args.scenes} mixtures of the default law, 3 s, drawn, rendered and mixed: bytes "
          f"of operands, operations")
    for name, size in traffic.bytes.most_common(12):
        print(f"{size / 1e9:8.3f} GB {traffic.calls[name]:5d} {name}")
    print(f"{traffic.bytes.total() / 1e9:8.3f} GB {traffic.calls.total():5d} in all")
    return 0


if __name__ == "__main__":
    end_with(main)
