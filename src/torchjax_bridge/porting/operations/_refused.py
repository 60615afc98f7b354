"""Functions that no translation can give, each with the reason and what to do instead."""

from ._table import refused

__all__: list[str] = []

refused(
    "gives an output whose shape depends on values, which jax.jit cannot have; use torch.where or a mask of the "
    "same shape",
    *("masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "combinations"),
)
refused(
    "writes to places that depend on values; use torch.where or scatter",
    *("masked_scatter", "put"),
)
refused(
    "counts values into bins whose borders depend on values; compute it outside of the model",
    *("histogram", "histogramdd", "mode"),
)
refused(
    "gives factors whose signs are not unique, so that torch and JAX may differ",
    *(
        "svd",
        "linalg.svd",
        "qr",
        "linalg.qr",
        "linalg.eigh",
        "linalg.eig",
        "symeig",
        "pca_lowrank",
        "svd_lowrank",
    ),
)
refused(
    "reads memory by strides, and JAX arrays have none; use slices, Tensor.unfold or indices",
    *("as_strided", "as_strided_scatter", "set", "resize", "resize_as"),
)
refused(
    "pools at random or back from positions, which no pooling of JAX does",
    *("fractional_max_pool2d", "fractional_max_pool2d_with_indices", "fractional_max_pool3d"),
    *("fractional_max_pool3d_with_indices", "max_unpool1d", "max_unpool2d", "max_unpool3d"),
)
refused(
    "hands a tensor to Python",
    *("apply", "map", "map2", "register_hook"),
)
