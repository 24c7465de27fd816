"""One thread for all tests, and for the processes they start; and the same examples in every run.

The tensors are small, and on a machine that others use too, threads wait for each other most of the time: on two busy
cores the suite took 117 s on one thread and 490 s on two.
"""
import gc
import os
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("steady", derandomize=True)  # a failure is one of the change, not of the day
settings.load_profile("steady")


def pytest_collection_finish():
    """What is there now stays: benchmarks collect garbage before every row, 0.3 s each over all of pytest's objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def in_interpreter(monkeypatch):
    """A function that makes the programs of modules ours run on a CPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # Programs of Triton's own, which the interpreter knows by what they put together with.
    monkeypatch.setattr(tl, "sum", lambda tile, axis: tl.reduce(tile, axis, tl.standard._sum_combine))
    monkeypatch.setattr(tl, "max", lambda tile, axis: tl.reduce(tile, axis, tl.standard._elementwise_max))

    def interpret(*modules: ModuleType):
        for module in modules:
            for name, program in list(vars(module).items()):
                if isinstance(program, JITFunction):
                    monkeypatch.setattr(module, name, InterpretedFunction(program.fn))
    return interpret
