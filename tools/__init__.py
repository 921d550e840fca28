"""Commands for people: start a cluster, look at it, measure it, inspect and make checkpoints."""
