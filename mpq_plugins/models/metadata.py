"""What reads a tensor without its values: attributes, methods and functions, by name."""

METADATA = {
    "__get__", "__class__", "__len__", "dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_cpu",
    "is_meta", "layout", "itemsize", "nbytes", "is_leaf", "is_sparse", "is_quantized", "grad", "name", "names", "size",
    "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point", "is_complex", "is_contiguous",
    "stride", "storage_offset", "get_device", "data_ptr", "is_inference", "is_shared", "requires_grad_",
    "register_hook", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
}  # fmt: skip
LIKE = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "is_tensor",
    "is_floating_point", "is_complex", "result_type",
}  # fmt: skip
"""Functions that take a tensor as an example of its dtype, device or shape."""
WITHOUT_VALUES = METADATA | LIKE
OF_FIRST = {"to", "type_as", "view_as", "expand_as", "reshape_as"}
"""Methods that give the values of their tensor, and take the next one as such an example."""
