"""`python -m reports` is the command `report`."""

import sys

from reports.cli import main

sys.exit(main())
