"""A run as it lies on storage. Neither torch nor ray is imported here."""
