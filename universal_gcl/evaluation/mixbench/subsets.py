"""The published subsets of MixBench (GR-CLIP, arXiv 2507.19054)."""

HUB_ID = "mixed-modality-search/MixBench25"
COLUMNS = ("it", "i", "t")  # modalities, in the order of its tables
# subset → number of queries, and of documents by modality
PUBLISHED = {
    "MSCOCO": (984, {"it": 328, "i": 328, "t": 328}),
    "Google_WIT": (1000, {"it": 1475, "i": 1473, "t": 1473}),
    "VisualNews": (981, {"it": 327, "i": 327, "t": 327}),
    "OVEN": (1000, {"it": 334, "i": 333, "t": 333}),
}
