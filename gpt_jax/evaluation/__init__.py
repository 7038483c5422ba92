"""What a finished model is worth: numbers of a text."""

from gpt_jax.evaluation.perplexity import divisible_batch, model_losses, strided_losses, text_perplexity

__all__ = ['divisible_batch', 'model_losses', 'strided_losses', 'text_perplexity']
