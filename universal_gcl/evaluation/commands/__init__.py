"""The commands of `gcl evaluate`."""
