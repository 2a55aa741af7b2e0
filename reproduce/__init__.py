"""Runs the methods' claims again on the small world, with controls beside them: `python -m reproduce` in a checkout.

One file per claim says what is claimed, its arms as data, the loop, and how numbers become a verdict: `sdft`, `sdpo`,
`tilt`, `discovery`, `context`. `experiment` is what they share, `records` what a run leaves and how it is judged,
`schedule` which runs are made, and `table.run` does it all. Results are in `docs/reproduction`. `commands` trains with
every method from the command line instead.

With `--group real` the studies are those on two real language models: `real_context`, `real_sdft`, `real_feedback`. A
run is the product's trainer there (`real_model`); `book` is the handbook that is learned, `real_exam` what is measured.
"""
