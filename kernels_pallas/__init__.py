"""Pallas kernels: arrays in, arrays out, one file per operator family with its reference.

`outer.chunk_outer` is the first: a decay per head, on TPUs. Other families run their XLA forms on every platform, and
`method="pallas"` says so when it is asked for. Files in this package import jax and nothing else of the project.
"""
