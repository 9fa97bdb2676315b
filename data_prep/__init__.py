"""Raw event files -> session shards, item features and a manifest. Runs without torch."""
