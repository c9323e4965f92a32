"""Which of torch's functions tell of a tensor what its placeholder tells as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def _descriptors() -> Iterator[Any]:
    """Yield what says of a tensor what a placeholder says as well."""
    for name in [
        "shape",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "retains_grad",
        "output_nr",
        "_version",
        "ndim",
        "nbytes",
        "itemsize",
        "is_cpu",
        "is_cuda",
        "is_xpu",
        "is_mps",
        "is_meta",
        "is_sparse",
        "is_sparse_csr",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "is_ipu",
        "is_vulkan",
        "is_mtia",
        "is_maia",
        "name",
        "names",
        "volatile",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_grad",
        "grad_dtype",
        "_base",
    ]:
        held = getattr(torch.Tensor, name, None)
        for way in ("__get__", "__set__", "__delete__"):
            if hasattr(held, way):
                yield getattr(held, way)
    for name in [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "get_device",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "requires_grad_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "retain_grad",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "is_inference",
        "is_neg",
        "is_conj",
        "__len__",
        "__hash__",
        "__dir__",
        "is_pinned",
        "is_shared",
        "is_coalesced",
        "_is_view",
        "is_same_size",
        "is_distributed",
        "has_names",
    ]:
        if hasattr(torch.Tensor, name):
            yield getattr(torch.Tensor, name)
    for name in [
        "numel",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_conj",
        "is_neg",
        "is_inference",
        "is_same_size",
    ]:
        yield getattr(torch, name)


DESCRIBE = frozenset(_descriptors())


LAYOUT = frozenset(
    {torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.storage_offset, torch.Tensor.dim_order}
)


STORAGES = frozenset({torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage})
