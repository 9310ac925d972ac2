"""Models: locating, loading, sharding, quantizing, faster kernels, and writing of weights."""
