"""A way on to Megatron: recipes for Megatron-Bridge. Knows options and layouts, and imports no Megatron."""
