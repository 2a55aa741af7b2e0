"""Measures speed, memory and accuracy, ours and the public peers': the suites behind `sdcore bench`.

Six suites: `divergence` (the output layer and its loss), `prefix` (passes that share a prompt), `trees`
(conversations: views of turns, searches, attempts that fork), `step` (a step's
update phase), `trainer` (whole trainers) and `scaling` (how time and memory grow). `compare` sets two results side by
side. What may be chosen, and where results go, is in `options`; the rest is imported when a suite runs.
"""
