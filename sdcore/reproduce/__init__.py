"""The methods' claims, run again on the small world with controls beside them.

One file per claim says what is claimed, its arms as data, the loop, and how numbers become a verdict: `sdft`, `sdpo`,
`tilt`, `discovery`, `context`. `experiment` is what they share, `records` what a run leaves and how it is judged,
`schedule` which runs are made, and `table.run` does it all. Results are in `docs/reproduction`.
"""
