"""One thread for all tests, and for the processes they start; and the same examples in every run.

The tensors are small, and on a machine that others use too, threads wait for each other most of the time: on two busy
cores the suite took 117 s on one thread and 490 s on two.
"""
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from hypothesis import settings  # noqa: E402

settings.register_profile("steady", derandomize=True)  # a failure is one of the change, not of the day
settings.load_profile("steady")


def pytest_collection_finish():
    """What is there now stays: benchmarks collect garbage before every row, 0.3 s each over all of pytest's objects."""
    gc.collect()
    gc.freeze()
