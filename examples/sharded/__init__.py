"""A sharded transformer that starts in torch (FSDP2), trains on in JAX over the same processes, and comes back.

Then its checkpoint is converted in parts that never talk, and restored by a JAX job on another mesh. Run
``python -m examples.sharded``. It needs one machine, no GPU and no network.
"""
