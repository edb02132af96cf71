"""The app of `gcl evaluate`, `compare`, and what the benchmarks' commands share."""
