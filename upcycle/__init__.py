"""Turns a pretrained dense language model into a fine-grained Mixture-of-Experts.

Importing this package makes transformers' Auto classes know `upcycled_moe`, as soon as they are themselves imported.
"""

import wrapt


@wrapt.when_imported("transformers.models.auto.configuration_auto")  # type: ignore[untyped-decorator]
def _register_config(_module: object) -> None:
    from upcycle.modeling.register import register_config

    register_config()


@wrapt.when_imported("transformers.models.auto.modeling_auto")  # type: ignore[untyped-decorator]
def _register_model(_module: object) -> None:
    from upcycle.modeling.register import register_model

    register_model()
