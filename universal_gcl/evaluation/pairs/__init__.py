"""Nine-way retrieval, mixed search and the modality gap on captioned images."""
