"""Session shards: their format, where they are stored, the order they are read in."""
