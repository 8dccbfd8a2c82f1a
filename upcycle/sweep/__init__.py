"""A question as a YAML file: expanded to arms, checked before anything starts, run to its end whatever is killed."""
