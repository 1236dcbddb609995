"""Bytes, anywhere."""
