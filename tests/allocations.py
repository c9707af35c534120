"""What operations allocate, read off the tensors that they give."""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, nn.Parameter)


class Allocations(TorchDispatchMode):
    """Largest new tensor that any operation gives; aliases of older tensors do not count.

    Attributes:
        elements: Its length.
        nbytes: Its bytes; the largest of either may be different tensors.
    """

    elements = nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if type(a) in _PLAIN}
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.numel())
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result
