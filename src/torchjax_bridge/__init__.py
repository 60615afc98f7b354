"""torchjax-bridge: PyTorch and JAX share tensors, weights and code."""
