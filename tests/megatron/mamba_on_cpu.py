"""What the kernels of mamba-ssm compute, step by step, under the names that Megatron-Core imports them by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """A norm over every group of channels; `z` is not given where a scan has gated its output."""

    def __init__(
        self, channels: int, *, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, y: Tensor) -> Tensor:
        grouped = y.unflatten(-1, (-1, self.group_size))
        normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return normed.flatten(-2) * self.weight


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    *,
    D: Tensor,  # noqa: N803  (the kernel's name)
    chunk_size: int,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: None,
) -> Tensor:
    """Convolution, scan and gate of Mamba-2 (arXiv 2405.21060), with float32 states.

    Args:
        zxbcdt: [sequences, tokens, channels of z, of x, of b and c in groups, heads].
        conv1d_weight: [channels of x, b and c, width]; its bias is [channels].
        dt_bias, a, D: [heads].
        chunk_size, norm_before_gate, seq_idx: without effect on what is computed here.
    """
    assert (activation, seq_idx) == ("silu", None)
    heads, width = a.shape[0], conv1d_weight.shape[1]
    channels = heads * headdim
    z, xbc, dt = zxbcdt.split([channels, conv1d_weight.shape[0], heads], dim=-1)
    padded = nn.functional.pad(xbc.transpose(1, 2), (width - 1, 0))
    mixed = nn.functional.conv1d(padded, conv1d_weight[:, None], conv1d_bias, groups=conv1d_weight.shape[0])
    inputs = (xbc.shape[-1] - channels) // 2
    x, b, c = nn.functional.silu(mixed).transpose(1, 2).split([channels, inputs, inputs], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (each.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2) for each in (b, c))
    dt = nn.functional.softplus(dt + dt_bias)
    state = torch.zeros(*x.shape[:1], heads, headdim, b.shape[-1])
    outputs = []
    for token in range(x.shape[1]):
        decay = torch.exp(dt[:, token] * a)[..., None, None]
        state = decay * state + (dt[:, token, :, None] * x[:, token])[..., None] * b[:, token, :, None]
        outputs.append((state * c[:, token, :, None]).sum(-1) + D[:, None] * x[:, token])
    return torch.stack(outputs, dim=1).flatten(-2) * nn.functional.silu(z)


mamba_chunk_scan_combined = None  # for generating alone
