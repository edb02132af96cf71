"""Converters from other formats to folders that GCL reads, and from GCL models to other formats."""
