"""Version, packages and dependencies of calm_dist: ``pip install -c constraints.txt -e .``

Names and descriptions are in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """``__version__`` as written, without importing the package and what it depends on."""
    text = (ROOT / "calm_dist" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('calm_dist/__init__.py: no line __version__ = "..."')
    return match[1]


setup(
    version=read_version(),
    packages=find_packages(include=["calm_dist", "calm_dist.*"]),
    package_data={
        "calm_dist": ["py.typed"],
        "calm_dist.rehearsal": ["*.c"],
        "calm_dist.gpu_check": ["*.json"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core==0.16.1",
        "deepspeed>=0.19.8,<0.20",
        "mosaicml-streaming==0.13.0",
        # Streaming 0.13.0 itself asks for <2.2, but works with later ones: see the Dockerfile.
        "numpy>=1.26,<3",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "tokenizers>=0.21",
        "tiktoken>=0.7",
        "zstandard>=0.22",
        # Parquet, Arrow and object stores. From 26 on it needs numpy 2.
        "pyarrow>=16",
        "fsspec>=2024.6",
        "tqdm>=4.66",
        "matplotlib>=3.8,<4",
        "wandb>=0.17",
        "tensorboard>=2.15",
    ],
    extras_require={
        # Where torch is a CUDA build, Triton came with it.
        "gpu": ["triton>=3.3"],
        # Its build needs torch: pip install --no-build-isolation '.[flash]', after everything else.
        "flash": ["flash-attn>=2.7"],
        "hf": ["transformers>=4.45,<5"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "mypy>=1.15",
            "scipy>=1.11",
            # An S3 server on loopback. moto[server] would bring every other service's needs.
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=5",
            "types-PyYAML>=6",
        ],
    },
)
