"""Turn thousands to millions of HDF5 embedding shards into one zarr dataset, and cluster it when it exceeds memory."""

__version__ = "0.1.0"
