"""The data room: bytes and rows, from a source to published shards. No torch, no ray."""
