"""MMEB's image tasks."""
