"""Converters: other formats into folders that GCL reads, and GCL models into other formats."""
