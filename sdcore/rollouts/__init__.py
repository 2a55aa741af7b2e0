"""Draws completions and says what they are worth.

`samplers` draws them, `rewards` calls reward functions, `sandbox` runs what a completion says under limits, `vllm` is
an engine of its own.
"""
