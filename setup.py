"""Build script. `kernels/` is installed as `cet.kernels`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"cet": ["py.typed"]},
)
