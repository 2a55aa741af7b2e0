"""The benchmark suite: `python -m benchmarks` from the root of a checkout; see README.md beside this file."""
