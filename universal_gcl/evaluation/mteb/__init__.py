"""MIEB and the other tasks of mteb that are texts and images."""
