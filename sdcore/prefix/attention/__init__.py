"""Attends over one packed row: what sees what, the function that transformers calls, and GPU kernels."""
