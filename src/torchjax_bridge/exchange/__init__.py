"""DATA CROSSES: tensors and pytrees of tensors, between torch and JAX."""
