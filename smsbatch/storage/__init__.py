"""Storage backends (disk, S3, web servers, drivers of fsspec) and the store of a run."""
