"""Weights of convolutions in the layout that oneDNN computes in, which it would else bring them into at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.runtime.streaming import Streamed, value
from ldm.runtime.tiling import is_seamless


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps the weight packed; as it was it is `Streamed`, and not in memory."""

    packed: tuple[Tensor, Tensor]  # which weight, and what it is packed

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or is_seamless():  # which looks into convolutions as they are
            return self._conv_forward(x, value(self.weight), self.bias)
        if self.packed[0] is not self.weight:  # a LoRA is in it, or out of it
            self.pack(value(self.weight))
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed[1], self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def pack(self, weight: Tensor) -> None:
        places = (self.padding, self.stride, self.dilation, self.groups)
        self.packed = self.weight, torch.ops.mkldnn._reorder_convolution_weight(weight, *places)


def pack(layer: nn.Module, weight: Streamed, value: Tensor) -> None:
    """Let a convolution have a weight whose value it keeps packed."""
    layer.__class__ = PackedConv2d
    assert isinstance(layer, PackedConv2d)
    layer.weight = weight
    layer.pack(value)


def packs(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether that pays: in bfloat16 on CPUs that compute it, not in float32."""
    able = device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return able and type(layer) is nn.Conv2d
