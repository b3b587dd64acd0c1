"""`python -m bench.profile` says where the time goes, operation by operation."""

import sys

from bench.worker.profile import main

if __name__ == "__main__":
    sys.exit(main())
