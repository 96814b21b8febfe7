# SPDX-License-Identifier: Apache-2.0
"""Known transforms, several methods, one table: ``python -m monai_zsreg.benchmark --help``."""
