"""Tensors between host and device, without waiting for the device.

Owns pinned memory and the one kind of event there is. On a CPU nothing is copied. Invariant: nothing here waits for
work that is queued later than what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on a device. On a GPU the host does not wait, not even for what was queued before."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host: queued now, waited for later, and only for what was queued before them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._host, self._event = list(tensors), None
        if tensors and tensors[0].is_cuda:
            self._host = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
