"""Checks, then times: `python -m experiments.bench [scan|decode|compile|step|training|peers|kernels|memory]`."""
