"""How fast lablib is compared with the usual ways of doing the same work: `python -m benchmarks`, or `make bench`."""
