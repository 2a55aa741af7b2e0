"""What half an hour on a GPU is spent on, in steps that can be done one at a time: `benchmarks/gpu_run.sh` runs it.

`plan` says what and within which time, `run` does it and keeps what was done, `parts` are the measurements, `curve` is
speed against workspace, `goals` what it all has to come to. Only in a checkout: it tests and tunes the sources there.
"""
