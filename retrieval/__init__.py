"""The retrieval engine: exact search over embeddings."""
