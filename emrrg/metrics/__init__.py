"""Scores of generated reports. Nothing here knows a model.

nlg         BLEU, METEOR, ROUGE-L, CIDEr, with baselines, intervals and paired tests
clinical    the 14 CheXpert observations, wrong sides, invented comparisons
labeler     the rules that read observations in a report, on the words of `lexicon`
chexbert    the same labels from a CheXbert checkpoint
external    RadGraph, RaTEScore and GREEN by their authors' packages
agreement   kappas and alpha of several annotators
groups      studies divided by view, sex, age band, ...
bootstrap   what all intervals and tests are made with
files       reports and labels in the files that systems leave
"""

from emrrg.metrics.nlg import compare_reports, score_reports

__all__ = ["compare_reports", "score_reports"]
