"""GPT-2 and GPT-3 language models in JAX/Flax. The rooms are laid out in docs/ARCHITECTURE.md."""

__version__ = '0.1.0'
