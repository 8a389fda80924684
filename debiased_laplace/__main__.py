"""`python -m debiased_laplace`, as torchrun starts it."""

import sys

from debiased_laplace.cli import main

if __name__ == "__main__":
    sys.exit(main())
