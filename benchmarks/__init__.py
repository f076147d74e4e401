"""How fast lablib is beside the usual ways of doing the same work: `python -m benchmarks`, or `make bench`.

Nothing here imports torch before it is needed, so that each rival's process loads only what that rival needs.
"""
