"""MIEB, and the other tasks of mteb with texts and images."""
