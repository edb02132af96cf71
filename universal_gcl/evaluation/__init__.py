"""Evaluation: protocols over embeddings, their metrics, tables and pictures."""
