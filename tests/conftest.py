"""Settings every test shares: eight simulated CPU devices, and caches of its own."""

import os

# Read when jax starts its backend, so before any test imports it.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('MPLBACKEND', 'agg')
