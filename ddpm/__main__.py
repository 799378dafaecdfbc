"""`python -m ddpm`, also installed as `ddpm`."""

import sys

from ddpm.commands import main

if __name__ == "__main__":
    sys.exit(main())
