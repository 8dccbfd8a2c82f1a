"""Turns a pretrained dense language model into a fine-grained Mixture-of-Experts.

Importing this package makes transformers' Auto classes know `upcycled_moe`, as soon as they are themselves imported.
"""

import importlib

import wrapt


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _import_config(_module: object) -> None:
    importlib.import_module("upcycle.modeling.configuration_upcycled_moe")


@wrapt.when_imported("upcycle.modeling.configuration_upcycled_moe")
def _register_config(_module: object) -> None:
    from upcycle.modeling.register import register_config

    register_config()


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _import_model(_module: object) -> None:
    importlib.import_module("upcycle.modeling.modeling_upcycled_moe")


@wrapt.when_imported("upcycle.modeling.modeling_upcycled_moe")
def _register_model(_module: object) -> None:
    from upcycle.modeling.register import register_model

    register_model()
