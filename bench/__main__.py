"""`python -m bench`, also installed as `ddpm-bench`."""

import sys

from bench import packages

packages.install()  # before anything of ours is imported

from bench.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
