"""The `upcycled_moe` model: a dense causal LM of transformers with mixtures of experts for FFNs in some layers.

This file travels inside converted checkpoints, beside configuration_upcycled_moe.py and selection_upcycled_moe.py: it
may import only those files, torch, transformers and the standard library.

Shapes: T tokens of all sequences, H hidden, N experts, K experts per token, I expert width, L the size in which experts
compute (the latent size where there is one, else H).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_upcycled_moe import UpcycledMoeConfig
from .selection_upcycled_moe import BiasedRouter, ExpertSelection, select_experts

# What transformers calls the cache, which goes in among a forward's other arguments: `past_key_values` until 5.24.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class UpcycledMoeRouter(BiasedRouter):
    """Scores every expert in float32, whatever the model's dtype, and keeps the best K."""

    def __init__(self, config: UpcycledMoeConfig) -> None:
        super().__init__()
        self.selection = ExpertSelection(
            top_k=config.num_experts_per_tok,
            order=config.router_order,
            renormalise=config.router_renormalise,
            scaling_factor=config.routed_scaling_factor,
            granularity=config.granularity,
            groups=config.groups,
        )
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.text_config.hidden_size))
        bias_N = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_correction_bias else None
        self.register_buffer("e_score_correction_bias", bias_N)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return float32 logits [T, N], weights [T, K] in the input's dtype, and expert indices [T, K]."""
        with maybe_autocast(device_type=x_TH.device.type, enabled=False):
            logits_TN = F.linear(x_TH.float(), self.weight.float())
            weights_TK, index_TK = select_experts(logits_TN, self.selection, self.e_score_correction_bias)
        return logits_TN, weights_TK.to(x_TH.dtype), index_TK


@use_experts_implementation
class UpcycledMoeExperts(nn.Module):
    """The routed experts, stacked along their first dimension.

    `experts_implementation` chooses the kernel; `forward` is the one called "eager".
    """

    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, config: UpcycledMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        N, width = config.num_experts, config.moe_intermediate_size
        L = config.moe_latent_size or config.text_config.hidden_size
        up, up_rows = ("gate_up_proj", 2 * width) if config.gated else ("up_proj", width)
        self.register_parameter(up, nn.Parameter(torch.empty(N, up_rows, L)))
        self.down_proj = nn.Parameter(torch.empty(N, L, width))
        if config.ffn_bias:
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(N, up_rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(N, L))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TL: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum [T, L] of the experts at `top_k_index` [T, K]."""
        # unbind, because the gradient of each weight[e] would be a zero tensor as large as all experts together.
        up = "gate_up_proj" if self.has_gate else "up_proj"
        ups, downs = getattr(self, up).unbind(0), self.down_proj.unbind(0)
        no_biases = (None,) * self.num_experts
        up_biases = getattr(self, f"{up}_bias").unbind(0) if self.has_bias else no_biases
        down_biases = self.down_proj_bias.unbind(0) if self.has_bias else no_biases

        experts = top_k_index.flatten()
        counts = experts.bincount(minlength=self.num_experts).tolist()
        slots_of_expert = torch.split(experts.argsort(stable=True), counts)
        y_TL = torch.zeros_like(x_TL)
        for e, slots in enumerate(slots_of_expert):
            if counts[e] == 0:
                continue
            tokens = slots // top_k_index.shape[-1]
            h = F.linear(x_TL[tokens], ups[e], up_biases[e])
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
            h = F.linear(h, downs[e], down_biases[e]) * top_k_weights.flatten()[slots, None]
            y_TL.index_add_(0, tokens, h.to(y_TL.dtype))
        return y_TL


class UpcycledMoeSharedExpert(nn.Module):
    """A plain FFN that every token visits."""

    def __init__(self, config: UpcycledMoeConfig) -> None:
        super().__init__()
        hidden, width = config.text_config.hidden_size, config.shared_expert_intermediate_size
        self.gate_proj = nn.Linear(hidden, width, bias=config.ffn_bias) if config.gated else None
        self.up_proj = nn.Linear(hidden, width, bias=config.ffn_bias)
        self.down_proj = nn.Linear(width, hidden, bias=config.ffn_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return [T, H]."""
        up = self.up_proj(x_TH)
        h = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x_TH)) * up
        return self.down_proj(h)  # type: ignore[no-any-return]


class UpcycledMoeSparseMoeBlock(nn.Module):
    """What stands where a dense FFN stood: takes and returns hidden states [..., H]."""

    def __init__(self, config: UpcycledMoeConfig) -> None:
        super().__init__()
        self.dropout = config.ffn_dropout
        self.gate = UpcycledMoeRouter(config)
        self.experts = UpcycledMoeExperts(config)
        H, L = config.text_config.hidden_size, config.moe_latent_size
        self.fc1_latent_proj = nn.Linear(H, L, bias=False) if L else None
        self.fc2_latent_proj = nn.Linear(L, H, bias=False) if L else None
        # The decorator fixes these two for a class; here they belong to a checkpoint.
        self.experts.has_gate, self.experts.has_bias = config.gated, config.ffn_bias
        self.shared_expert = UpcycledMoeSharedExpert(config) if config.shared_expert_intermediate_size else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Route each token to its experts."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, index_TK = self.gate(x_TH)
        x_TL = x_TH if self.fc1_latent_proj is None else self.fc1_latent_proj(x_TH)
        y_TL = self.experts(x_TL, index_TK, weights_TK)
        y_TH = y_TL if self.fc2_latent_proj is None else self.fc2_latent_proj(y_TL)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        return F.dropout(y_TH, self.dropout, self.training).reshape(hidden_states.shape)


class UpcycledMoePreTrainedModel(PreTrainedModel):
    """The dense model that `config.text_config` describes, as `language_model`, with MoE blocks for FFNs."""

    config: UpcycledMoeConfig
    dense_class: Any
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}
    # What the dense model cannot do, it refuses itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UpcycledMoeConfig) -> None:
        super().__init__(config)
        # A dense model refuses a named experts implementation; ours is read from `config`.
        config.text_config._experts_implementation = None
        self.language_model = self.dense_class.from_config(config.text_config, dtype=torch.get_default_dtype())
        for layer in config.moe_layers:
            path = config.ffn_path.format(layer=layer)
            self.language_model.set_submodule(path, UpcycledMoeSparseMoeBlock(config), strict=True)
        self.language_model.ep_plan = self._expert_parallel_plan()
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def moe_blocks(self) -> list[UpcycledMoeSparseMoeBlock]:
        """The MoE blocks, in the order of `config.moe_layers`."""
        return [self.language_model.get_submodule(self.config.ffn_path.format(layer=i)) for i in self.config.moe_layers]

    def _expert_parallel_plan(self) -> dict[str, str]:
        """How the dense model's paths spread experts over ranks; its own plans cover everything else."""
        experts = f"{self.config.ffn_path.format(layer='*')}.experts"
        stacked = {f"{experts}.{name}": "grouped_gemm" for name, _ in self.moe_blocks[0].experts.named_parameters()}
        return {**stacked, experts: "ep_dispatch_experts"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, UpcycledMoeSparseMoeBlock):
            for part in (module.gate, module.experts):
                for name, parameter in part.named_parameters():
                    if name.endswith("_bias"):
                        init.zeros_(parameter)
                    else:
                        init.normal_(parameter, std=self.config.text_config.initializer_range)
            for buffer in module.gate.buffers():
                init.zeros_(buffer)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint filled; the dense model's own initialiser does not know the MoE blocks."""
        super().initialize_weights()  # type: ignore[no-untyped-call]
        for block in self.moe_blocks:
            self._init_weights(block)

    def get_decoder(self) -> nn.Module:
        """Return the dense model's decoder, without its head."""
        return self.language_model.get_decoder()  # type: ignore[no-any-return]


class UpcycledMoeForCausalLM(UpcycledMoePreTrainedModel, GenerationMixin):
    """With the dense causal LM's head."""

    _auto_class = "AutoModelForCausalLM"
    dense_class = AutoModelForCausalLM

    def get_output_embeddings(self) -> nn.Module:
        """Return the dense model's head."""
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the dense model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Let the dense model choose: Phi-3's override drops the cache where its long rotary factors begin."""
        return self.language_model.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[no-any-return]

    @contextmanager
    def _record_router_logits(self) -> Iterator[list[torch.Tensor]]:
        recorded: list[torch.Tensor] = []
        hooks = [
            block.gate.register_forward_hook(lambda _module, _args, output: recorded.append(output[0]))
            for block in self.moe_blocks
        ]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the dense causal LM's forward, whose arguments these are.

        With `output_router_logits` (by default `config.output_router_logits`) the result carries `router_logits`, one
        [T, N] per MoE layer, and `aux_loss`, Switch's load-balancing loss over the tokens that a two-dimensional
        `attention_mask` keeps; with `labels`, `loss` includes it times `config.router_aux_loss_coef`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        with self._record_router_logits() if output_router_logits else nullcontext() as router_logits:
            outputs = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        loss, aux_loss = outputs.loss, None
        if router_logits:
            aux_loss = self._load_balancing_loss(router_logits, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=outputs.logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(router_logits) if router_logits else None,  # type: ignore[arg-type]
        )

    def _load_balancing_loss(self, logits: list[torch.Tensor], attention_mask: torch.Tensor | None) -> torch.Tensor:
        # At the top it would be a circular import where a model of transformers' is imported before its Auto classes.
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            # With a cache the mask also covers tokens that were routed in earlier calls.
            mask = attention_mask[:, -(logits[0].shape[0] // attention_mask.shape[0]) :]
        return load_balancing_loss_func(  # type: ignore[return-value]
            tuple(logits),  # type: ignore[arg-type]
            self.config.num_experts,
            self.config.num_experts_per_tok,
            mask,
        )


class UpcycledMoeForSequenceClassification(UpcycledMoePreTrainedModel):
    """With a linear head `score` on the last token that is not padding, one score for each of `config.id2label`."""

    _auto_class = "AutoModelForSequenceClassification"
    dense_class = AutoModelForSequenceClassification

    def __init__(self, config: UpcycledMoeConfig) -> None:
        for name in ("id2label", "label2id", "problem_type"):
            setattr(config.text_config, name, getattr(config, name))
        super().__init__(config)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Run the dense classifier's forward, whose arguments these are; its loss balances no experts."""
        return self.language_model(  # type: ignore[no-any-return]
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, return_dict=True, **kwargs
        )
