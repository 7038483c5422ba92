"""From a prompt to text."""

from gpt_jax.inference.decode import Generation, Sampling, generate, sample_text

__all__ = ['Generation', 'Sampling', 'generate', 'sample_text']
