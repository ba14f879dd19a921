"""`python -m chandra.bench gpu`."""

from __future__ import annotations

import sys

from chandra.bench.gpu import main
from chandra.errors import ChandraError

try:
    sys.exit(main(sys.argv[1:]))
except ChandraError as error:
    print(f"chandra.bench: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
