# SPDX-License-Identifier: Apache-2.0
"""Print the folder of the MONAI Label app, for ``monailabel start_server --app $(python -m monai_zsreg.label)``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from monai_zsreg.errors import RegistrationError
from monai_zsreg.label import app_folder


def main(argv: Sequence[str] | None = None) -> int:
    """
    Args:
        argv: arguments; those of the process if None.

    Returns:
        Exit status: 0, or 2 where the folder cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m monai_zsreg.label", description=__doc__)
    parser.add_argument("folder", nargs="?", help="where the server may write its logs; the user's cache if left out")
    try:
        print(app_folder(parser.parse_args(argv).folder))
    except RegistrationError as error:
        print(f"wrong input: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
