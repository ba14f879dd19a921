"""`python -m chandra` is the `chandra` command."""

import sys

from chandra.cli import main

sys.exit(main())
