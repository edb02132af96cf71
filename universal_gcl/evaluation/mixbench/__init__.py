"""MixBench: search over a pool of mixed modalities."""
