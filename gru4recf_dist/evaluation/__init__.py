"""Exact full-sort evaluation over the sharded table."""
