"""`python -m orchestration VERB ...` is the same as `mixflow VERB ...`."""

import sys

from orchestration.cli import main

sys.exit(main())
