"""Bytes and rows, from a source to published shards. Imports neither torch nor ray."""
