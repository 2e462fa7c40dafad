"""Scores of generated reports: language (`nlg`), clinical (`clinical`), and agreement between
label sources (`agreement`). Pure functions; nothing here knows a model."""

from emrrg.metrics.nlg import compare_reports, score_reports

__all__ = ["compare_reports", "score_reports"]
