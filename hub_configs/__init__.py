"""Recipes, configurations for `accelerate launch` and the template of the model card, as package data."""
