"""A sharded transformer that starts in torch (FSDP2), trains on in JAX over the same processes, and comes back.

Run ``python -m examples.sharded``. It needs one machine, no GPU and no network.
"""
