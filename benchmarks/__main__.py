"""`python -m benchmarks`: the whole suite in one process; see run.py."""

from benchmarks.run import main

main()
