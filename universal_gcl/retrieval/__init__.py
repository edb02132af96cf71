"""The retrieval engine: rows to embeddings on disk, and exact search over them."""
