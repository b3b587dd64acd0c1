"""`python -m bench.worker REQUEST.json RESULT.jsonl` is the process of one run."""

import sys

from bench.worker.worker import main

if __name__ == "__main__":
    sys.exit(main())
