"""What each crossing costs: ``python -m benchmarks``."""
