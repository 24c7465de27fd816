"""Benchmarks anyone can run, from the root of the repository: python -m benchmarks.bench_rir and its neighbours."""
