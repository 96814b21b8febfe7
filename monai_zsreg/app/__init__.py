# SPDX-License-Identifier: Apache-2.0
"""The application: pairs of files in, moved images, transforms, reports and pages out.

The command ``zsreg`` (`cli`) and the MONAI bundle (`bundle`) make `settings` and a `datalist` of what the user says.
Each pair goes through `run`: read, register, describe (with the figures of `evaluate`), write (with the pages of
`report`); `cohort` does so with many. The reports that were written are what `tables` tells of.
"""
