"""Rollouts: where completions come from, and what they are worth.

`samplers` draws them, `rewards` calls reward functions, `sandbox` runs what a completion says under limits, `vllm` is
an engine of its own.
"""
