# SPDX-License-Identifier: Apache-2.0
"""Reports that people look at: one page for a pair, which opens offline, and an index of many."""

from __future__ import annotations

from monai_zsreg.app.report.page import save_html_report, save_index, save_interactive
from monai_zsreg.app.report.pictures import Views, save_overview, save_spread

__all__ = ["Views", "save_html_report", "save_index", "save_interactive", "save_overview", "save_spread"]
