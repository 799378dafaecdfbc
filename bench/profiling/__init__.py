"""Where the time of a sample goes: measured by `measure`, read by `trace` and `operators`, shown by `page`."""
