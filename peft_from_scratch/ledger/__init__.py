"""The claims ledger: what the textbook says, tried by experiments, and the verdicts.

Reading order: claim.py (a claim and the rule that decides it), runs.py (runs, kept by
the hash of their configuration), experiments/ (one file an experiment), rates.py and
intervals.py (what they share), verdicts.py (every claim's verdict, computed from the
stored runs).
"""
