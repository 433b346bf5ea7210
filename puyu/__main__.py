"""`python -m puyu` is the command `puyu`."""

import sys

from puyu.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
