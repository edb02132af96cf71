"""The retrieval engine: embed rows into a store on disk, and search stores exactly."""
