"""Attention over one packed row: what attends to what, the function that transformers calls, and GPU kernels."""
