"""Lists the packages to install; everything else is in pyproject.toml.

`packages.find` in pyproject.toml cannot do this: `vitzoo_hf.cards` lies in `cards/`, where no search looks for it.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["vitzoo_hf*"]), "vitzoo_hf.cards"])
