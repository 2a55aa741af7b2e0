"""Self-distillation of language models: distil what a model does with extra context into the model without it.

Importing this package imports neither torch nor transformers, so that `python -m sdcore --help` answers at once.
The fused kernels are a package of their own, `sdkernels`.
"""

__version__ = "0.1.0"
