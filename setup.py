"""Map the top-level rooms kernels/, train/ and bench/ to sub-packages of phi1.

The metadata is in pyproject.toml. `packages` has to be listed here: with `package_dir` alone setuptools
would install a distribution without `phi1/*.py`, and a top-level package called `kernels` would collide with
Hugging Face's distribution of that name, which transformers imports.
"""

from setuptools import find_packages, setup

ROOMS = {"phi1": "phi1", "phi1.kernels": "kernels", "phi1.train": "train", "phi1.bench": "bench"}

setup(
    packages=[*ROOMS, *(f"{name}.{part}" for name, folder in ROOMS.items() for part in find_packages(folder))],
    package_dir=ROOMS,
    package_data={
        "phi1": ["py.typed", "assets/*"],
        "phi1.kernels": ["tuned/*.json", "tuned/gpus/*.json"],
        "phi1.train": ["configs/*.toml"],
        "phi1.bench.compile": ["table.json", "allowed.toml"],
    },
)
