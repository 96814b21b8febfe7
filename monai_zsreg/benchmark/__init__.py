# SPDX-License-Identifier: Apache-2.0
"""Known transforms, several methods, one table: ``python -m monai_zsreg.benchmark --help``."""

from importlib.util import find_spec

for _name in ("matplotlib", "pandas", "skimage", "sklearn"):
    if find_spec(_name) is None:
        raise ImportError(f'the benchmark needs {_name}: pip install "monai-zsreg[benchmark]"', name=_name)
