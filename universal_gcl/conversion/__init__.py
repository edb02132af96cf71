"""Converters of checkpoints, models and test data into the formats of others, and back."""
