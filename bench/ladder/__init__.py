"""`ddpm-bench ladder`: one rung per optimisation, milliseconds per step and quality beside each other."""
