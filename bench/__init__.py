"""Measures everything below: the command line `ddpm-bench`."""
