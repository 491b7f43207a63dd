"""Kernels for NVIDIA's Hopper GPUs (H100, H200): the operators of the package, with the same arguments.

`outer.chunk_outer` (a decay per head) and `outer_keys.chunk_outer_keys` (a decay per key) so far; what they share is in
`common`. They are written for Mosaic GPU: copies by the tensor memory accelerator, products of a warp group. None has
run on a GPU yet.
"""
