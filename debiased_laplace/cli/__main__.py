"""Entry point of `python -m debiased_laplace.cli`."""

import sys

from debiased_laplace.cli import main

sys.exit(main())
