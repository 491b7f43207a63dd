"""Kernels for NVIDIA GPUs from Hopper on: the operators of the package, with the same arguments.

`outer.chunk_outer` and `delta.chunk_delta`, with a decay per head, are the only ones so far; what they and the next
ones need is in `common`. They are written for Mosaic GPU: copies by the tensor memory accelerator, products of a warp
group. None has run on a GPU yet.
"""
