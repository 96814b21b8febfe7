# SPDX-License-Identifier: Apache-2.0
"""What a run can be told, and the names of its files.

Nothing heavy is imported here: ``zsreg --help`` must not wait for torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# those of `monai_zsreg.registration`, which imports torch
PRESETS = ("robust", "keypoints", "paper")
TRANSFORMS = ("rigid", "similarity", "affine", "deformable")
# the pair that is registered where the user names none
DEMONSTRATION = "demonstration"
# the file of a pair's results that is written last, those beside the folders of many pairs, those of an evaluation
REPORT = "report.json"
SUMMARY, INDEX = "summary.csv", "index.html"
TABLE, EVALUATION = "evaluation.csv", "evaluation.json"
# exit statuses of the commands; 0: registered, 1: anything else
WRONG_INPUT, FAILED = 2, 3


@dataclass(frozen=True)
class Settings:
    """What is done with every pair of a run: options of the command and of the bundle, by the same names.

    Args:
        output_dir: results of a pair go to a folder of its name in here.
        preset, transform, device, vgg19_weights, regressor_weights, seed: see `monai_zsreg.register`.
        options: further arguments of `monai_zsreg.register`.
        fill_value: what stands outside of the moved image; None for its own background.
        uncertainty: whether to blacken pixels and estimate again (section 2.7 of the paper); costs ten estimates.
        page: whether to draw the pictures and the page.
        niivue: file ``niivue.umd.js`` of NiiVue, for a page on which one looks through both images; None for none.
        exact: whether to measure how alike the images are on all voxels, not on some two million.
        demonstration_dims: 2 for a slice or 3 for a volume of the demonstration pair.
    """

    output_dir: str | os.PathLike = "output"
    preset: str = PRESETS[0]
    transform: str = "affine"
    device: Any = None
    vgg19_weights: str | os.PathLike | None = None
    regressor_weights: str | os.PathLike | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    fill_value: float | None = None
    uncertainty: bool = False
    page: bool = True
    niivue: str | os.PathLike | None = None
    exact: bool = False
    demonstration_dims: int = 3

    @classmethod
    def of(cls, given: Mapping[str, Any], **more: Any) -> Settings:
        """From what a user gave, of which only what is a setting counts."""
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given} | more)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `monai_zsreg.register`."""
        names = ("preset", "transform", "device", "vgg19_weights", "regressor_weights", "seed")
        return {name: getattr(self, name) for name in names} | dict(self.options)

    def check(self) -> None:
        """
        Raises:
            RegistrationError: what `monai_zsreg.register` would refuse whatever the images are.
        """
        from monai_zsreg.registration import check_options, resolve_device

        check_options(self.preset, self.transform, self.seed, vgg19_weights=self.vgg19_weights, **self.options)
        resolve_device(self.device)

    def channel(self, side: str) -> int:
        """The channel of the fixed or the moving image that is registered."""
        return int(self.options.get(f"{side}_channel", 0))

    def folder(self, name: str) -> Path:
        """Where a pair's results go."""
        return Path(self.output_dir) / name
