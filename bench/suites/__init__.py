"""One module per suite: `workloads(quick) -> list[Workload]`, see `bench.registry`."""
