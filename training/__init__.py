"""Training: arguments, recipe, data, trainer. Nothing is imported here: each caller pays for what it uses."""
