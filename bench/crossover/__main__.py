"""`python -m bench.crossover` finds where kernels cross over."""

import sys

from bench.crossover.measure import main

if __name__ == "__main__":
    sys.exit(main())
