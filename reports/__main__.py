"""`python -m reports` is the command `report`."""

from reports.cli import main

raise SystemExit(main())
