"""Packaging of gpt_jax: `pip install -e .` for use, `pip install -e '.[test]'` for development."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'gpt_jax' / '__init__.py').read_text()).group(1)

setup(
    name='gpt_jax',
    version=VERSION,
    description='GPT-2 and GPT-3 language models in JAX/Flax: train, evaluate, generate; from a laptop to a pod.',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='MIT',
    python_requires='>=3.11',
    packages=find_packages(include=['gpt_jax', 'gpt_jax.*']),
    install_requires=[
        'absl-py>=2.1',
        'datasets>=4.6',
        'etils[epath]>=1.12',
        'filelock>=3.13',
        'flax>=0.12',
        'grain>=0.2.12',
        'huggingface_hub>=0.30',
        'jax>=0.10',
        'matplotlib>=3.8',
        'ml-collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.12',
        'platformdirs>=4.0',
        'pyarrow>=15.0',
        'rich>=13.7',
        'safetensors>=0.8',
        'tensorboardX>=2.6.2',
        'tokenizers>=0.21',
        'tqdm>=4.66',
    ],
    extras_require={
        'cuda12': ['jax[cuda12]>=0.10'],
        'cuda13': ['jax[cuda13]>=0.10'],
        # The compiler without the libraries that run on a GPU; cuDNN's attention kernels are made at compile time.
        'gpu-aot': ['jax[cuda12-local]>=0.10', 'nvidia-cudnn-cu12>=9.8,<10'],
        'tpu': ['jax[tpu]>=0.10'],
        'tpu-aot': ['libtpu>=0.0.30'],
        'gcs': ['gcsfs>=2025.5'],
        's3': ['s3fs>=2025.5'],
        'notebook': ['ipykernel>=6.29', 'jupyterlab>=4.2'],
        'parity': ['torch>=2.6', 'transformers>=5.0'],
        'test': [
            'gcp-storage-emulator>=2026.7.18',
            'gcsfs>=2025.5',
            'hypothesis>=6.100',
            'ipykernel>=6.29',
            'nbclient>=0.10',
            'nbformat>=5.10',
            'pytest>=8.0',
            'pytest-xdist>=3.6',
            'pyyaml>=6.0',
            'ruff>=0.14',
            'tiktoken>=0.7',
        ],
    },
)
