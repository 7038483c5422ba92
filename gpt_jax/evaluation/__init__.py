"""What a finished model is worth: numbers of a text."""

from gpt_jax.evaluation.perplexity import model_losses, strided_losses, text_perplexity

__all__ = ['model_losses', 'strided_losses', 'text_perplexity']
