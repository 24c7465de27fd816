"""One thread for all tests, and for the processes they start.

The tensors are small, and on a machine that others use too, threads wait for each other most of the time: on two busy
cores the suite took 117 s on one thread and 490 s on two.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
