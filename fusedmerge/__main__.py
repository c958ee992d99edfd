"""`python -m fusedmerge` is `fusedmerge`."""

from __future__ import annotations

import sys

from fusedmerge.cli import main

sys.exit(main())
