"""This project and its peers, measured alternating in one run: ``scripts/benchmark.py``."""
