"""Benchmarks, run from the repository: python -m bench.bench_selective_scan.  Not part of the wheel."""
