"""Training: arguments, recipe, data, trainer. This file imports nothing, so a caller only imports what it uses."""
