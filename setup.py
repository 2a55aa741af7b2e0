"""Where the two import packages lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ is a source root, not a package: a top-level `kernels` would shadow the one that transformers imports.
    package_dir={"sdcore": "sdcore", "sdkernels": "kernels/sdkernels"},
    packages=find_packages(".", include=["sdcore", "sdcore.*"]) + find_packages("kernels"),
)
