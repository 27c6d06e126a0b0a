"""Distances between rows.

dense       four metrics on a block of rows against another, correct to 1e-6
pairwise    all rows against all rows, block by block, from numpy, dask and zarr arrays
"""
