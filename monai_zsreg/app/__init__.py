# SPDX-License-Identifier: Apache-2.0
"""The application: pairs of files in, moved images, transforms, reports and pages out.

`run` has the steps of one pair, `cohort` the lists of many, `evaluate` the figures over them, `report` the pages, `cli`
the command ``zsreg`` and `bundle` what the MONAI bundle's configurations are made of.
"""
