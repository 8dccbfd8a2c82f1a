"""A dense model of the same proportions as a large one, with random weights, small enough to convert on a laptop.

python examples/scaled_down.py CONFIG_DIRECTORY OUTPUT [--shrink 8] [--layers 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="directory with the config.json of the large model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--shrink", type=int, default=8, help="divides every width and the vocabulary")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.config)
    for name in WIDTHS:
        if getattr(config, name) % options.shrink:
            parser.error(f"--shrink={options.shrink} does not divide {name}, which is {getattr(config, name)}")
        setattr(config, name, getattr(config, name) // options.shrink)
    config.num_hidden_layers = options.layers
    config.bos_token_id, config.eos_token_id = 1, 2  # those of the large model lie beyond the vocabulary
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.output, max_shard_size="1GB")
    print(f"wrote {options.output}: {model.num_parameters() / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
