"""Model cards, and complete model folders that can be pushed to the Hub."""
