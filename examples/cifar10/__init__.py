"""A trained CIFAR-10 network goes from PyTorch to Flax and back."""
