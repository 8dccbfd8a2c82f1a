"""Low precision as data: formats, recipes, and which matrices of a model are multiplied in them."""
