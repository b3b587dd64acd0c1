"""`python -m quantable` is the command `quantable`."""

import sys

from quantable.cli import main

sys.exit(main())
