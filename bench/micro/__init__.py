"""Micro benchmarks."""
