"""Makes transformers' Auto classes know `upcycled_moe`. May know the code files beside it and transformers."""


def register_config() -> None:
    """Let `AutoConfig` read `upcycled_moe` configs without remote code; calling it again is harmless."""
    from transformers import AutoConfig

    from upcycle.modeling.configuration_upcycled_moe import UpcycledMoeConfig

    AutoConfig.register(UpcycledMoeConfig.model_type, UpcycledMoeConfig, exist_ok=True)


def register_model() -> None:
    """Let Auto classes load `upcycled_moe` checkpoints without remote code; calling it again is harmless."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from upcycle.modeling.configuration_upcycled_moe import UpcycledMoeConfig
    from upcycle.modeling.modeling_upcycled_moe import (
        UpcycledMoeForCausalLM,
        UpcycledMoeForSequenceClassification,
    )

    AutoModelForCausalLM.register(UpcycledMoeConfig, UpcycledMoeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(UpcycledMoeConfig, UpcycledMoeForSequenceClassification, exist_ok=True)
