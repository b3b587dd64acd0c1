"""`python -m bench` is the command `bench`."""

import sys

from bench.cli import main

sys.exit(main())
