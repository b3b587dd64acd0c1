"""`python -m quantable` is the command `quantable`."""

from quantable.cli import main

raise SystemExit(main())
