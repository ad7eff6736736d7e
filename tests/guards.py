"""Memory in which stray reads and writes are seen.

    with Guarded() as guarded:
        out = kernel(guarded(x), guarded(w))      # every torch.empty / new_empty inside is guarded too

Each tensor stands in a larger buffer of 0xFF bytes: NaN in every floating-point type, -1 in integers. A read beyond a tensor, or of an
output element that nothing wrote, gives NaN; a write beyond one changes a guard byte, and leaving the block then fails.
Call a backend's own function, not the op in llama4_kernels.ops: the allocations inside a registered torch op cannot be replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GUARD_BYTES = 4096
_ALLOCATIONS = {torch.empty, torch.empty_like, Tensor.new_empty}
_FILLED_ALLOCATIONS = {torch.zeros, torch.zeros_like, torch.full, Tensor.new_zeros, Tensor.new_full}


class Guarded(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self._buffers: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor` between guard bytes."""
        guarded = self._allocate(tensor)
        guarded.copy_(tensor)
        return guarded

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            return self._allocate(result)
        if func in _FILLED_ALLOCATIONS:
            return self(result)
        return result

    def __exit__(self, exception_type, exception, traceback):
        super().__exit__(exception_type, exception, traceback)
        if exception_type is None:
            self.check()

    def check(self) -> None:
        """AssertionError where a byte beside a tensor was written."""
        for buffer in self._buffers:
            for side, guard in (("before", buffer[:_GUARD_BYTES]), ("after", buffer[-_GUARD_BYTES:])):
                touched = (guard != 0xFF).nonzero().flatten().tolist()
                size = buffer.numel() - 2 * _GUARD_BYTES
                assert not touched, f"bytes {touched[0]} to {touched[-1]} of the guard {side} a tensor of {size} bytes were written"

    def _allocate(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        buffer = torch.full((size + 2 * _GUARD_BYTES,), 0xFF, dtype=torch.uint8, device=like.device)
        self._buffers.append(buffer)
        return buffer[_GUARD_BYTES : _GUARD_BYTES + size].view(like.dtype).view(like.shape)
