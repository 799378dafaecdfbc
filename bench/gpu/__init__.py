"""`make gpu`: everything that only a GPU can tell, in one command of under nine minutes, see `bench.gpu.command`."""
