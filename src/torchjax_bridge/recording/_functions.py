"""Names of torch's functions: how they are shortened, which only ask, which ask for values.

A list by name is unavoidable here: nothing in torch says whether ``Tensor.is_contiguous`` computes.
"""

__all__ = ["QUESTIONS", "RANDOM", "READS_NOTHING", "short_name"]

# Their answers depend on neither values nor sizes: dtypes, devices, modes, memory.
READS_NOTHING = frozenset(
    {
        "_assert",
        "_assert_async",
        "_base",
        "_has_torch_function",
        "_is_all_true",  # an assertion of torch.distributions
        "_is_zerotensor",
        "_set_grad_enabled",
        "_version",
        "can_cast",
        "data_ptr",
        "device",
        "dim",
        "dtype",
        "element_size",
        "finfo",
        "get_default_dtype",
        "get_device",
        "grad",
        "grad_fn",
        "iinfo",
        "is_autocast_available",
        "is_autocast_enabled",
        "is_complex",
        "is_conj",
        "is_contiguous",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_grad_enabled",
        "is_inference",
        "is_inference_mode_enabled",
        "is_ipu",
        "is_leaf",
        "is_maia",
        "is_meta",
        "is_mkldnn",
        "is_mps",
        "is_neg",
        "is_nested",
        "is_pinned",
        "is_quantized",
        "is_same_size",
        "is_signed",
        "is_sparse",
        "is_storage",
        "is_tensor",
        "is_xla",
        "is_xpu",
        "itemsize",
        "layout",
        "names",
        "nbytes",
        "ndim",
        "ndimension",
        "promote_types",
        "requires_grad",
        "requires_grad_",
        "result_type",
        "retain_grad",
        "set_default_dtype",
        "set_grad_enabled",
        "storage",
        "storage_offset",
        "stride",
        "untyped_storage",
    }
)

# They hand the values of a tensor to Python, and what they are called.
QUESTIONS = {
    "__array__": "numpy.asarray()",
    "__bool__": "bool()",
    "__complex__": "complex()",
    "__contains__": "the operator in",
    "__dlpack__": "Tensor.__dlpack__()",
    "__float__": "float()",
    "__format__": "format()",
    "__index__": "an index",
    "__int__": "int()",
    "__repr__": "repr()",
    "allclose": "torch.allclose()",
    "equal": "torch.equal()",
    "is_nonzero": "torch.is_nonzero()",
    "item": "Tensor.item()",
    "numpy": "Tensor.numpy()",
    "tolist": "Tensor.tolist()",
}


# Their results differ from call to call, whatever they are given.
RANDOM = frozenset(
    {
        "bernoulli",
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "normal",
        "normal_",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "random_",
        "randperm",
        "uniform_",
    }
)


def short_name(full: str) -> str:
    """The last part of a public name; of a property, the property: ``torch.Tensor.shape.__get__`` is ``shape``."""
    parts = full.split(".")
    return parts[-2] if parts[-1] == "__get__" and len(parts) > 1 else parts[-1]
