# SPDX-License-Identifier: Apache-2.0
"""The paper's networks: features, keypoints, regressor, resampler, and the four composed.

An argument out of its range, of another type or of another shape raises a `RegistrationError` that names it; shapes are
not checked in a scripted network.

References:
    Kori and Krishnamurthi, Zero Shot Learning for Multi-Modal Real Time Image Registration (2019).
"""

from monai_zsreg.networks.coordinates import AffineResampler
from monai_zsreg.networks.keypoints import CenterOfMass, KeypointDetector
from monai_zsreg.networks.least_squares import TRANSFORMS, LeastSquaresAffine
from monai_zsreg.networks.regressors import AffineRegressor
from monai_zsreg.networks.vgg import IMAGENET, UNTRAINED_FOR_CHECKS_ONLY, VGG19Features, bundled_vgg19
from monai_zsreg.networks.zero_shot import AffineEstimate, Status, ZeroShotAffineNet

__all__ = [
    "IMAGENET",
    "TRANSFORMS",
    "UNTRAINED_FOR_CHECKS_ONLY",
    "AffineEstimate",
    "AffineRegressor",
    "AffineResampler",
    "CenterOfMass",
    "KeypointDetector",
    "LeastSquaresAffine",
    "Status",
    "VGG19Features",
    "ZeroShotAffineNet",
    "bundled_vgg19",
]
