"""Experts without a gate for vLLM on a CPU, where it has none: `NotImplementedError: is_act_and_mul=False is supported
only for CUDA, XPU and ROCm for now`. What config.json and weights say to it, routing and its scale, latents, shared
experts and Mamba-2 stay vLLM's own; the two products of an expert and the squared ReLU between them are computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

ACTIVATION, GATED = MoEActivation.RELU2_NO_MUL, cpu_moe.CPUUnquantizedExperts


class UngatedExperts(GATED):
    """What vLLM has for a CPU, and these."""

    @staticmethod
    def is_supported_config(cls: type[Any], moe_config: FusedMoEConfig, *formats: Any) -> tuple[bool, str | None]:
        if moe_config.activation is ACTIVATION:
            return True, None
        return GATED.is_supported_config(cls, moe_config, *formats)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.moe_config.activation is not ACTIVATION:
            super().process_weights_after_loading(layer)

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, **given: Any) -> None:
        """w1 [experts, width, inputs], w2 [experts, outputs, width]; one token after the other."""
        if given["activation"] is not ACTIVATION:
            return super().apply(output=output, hidden_states=hidden_states, **given)
        for token, x in enumerate(hidden_states):
            experts = given["topk_ids"][token].long()
            hidden = (given["w1"][experts] @ x).relu().square()
            made = torch.einsum("kow,kw->ko", given["w2"][experts], hidden)
            output[token] = given["topk_weights"][token].to(made.dtype) @ made


def give_ungated_experts() -> None:
    """Let vLLM take them for its own."""
    configured = FusedMoEConfig.__post_init__

    def configure(config: FusedMoEConfig) -> None:
        try:
            configured(config)
        except NotImplementedError:
            if config.activation is not ACTIVATION:
                raise

    FusedMoEConfig.__post_init__ = configure
    cpu_moe.CPUUnquantizedExperts = UngatedExperts
