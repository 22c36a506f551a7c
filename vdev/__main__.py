"""``python -m vdev``: the same program as the ``vdev`` command."""

import sys

from vdev.cli import main

if __name__ == "__main__":
    sys.exit(main())
