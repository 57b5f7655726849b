"""The claims ledger: what the textbook says, tried by experiments, and the verdicts.

claim.py         a claim, and the rule that decides it
rule_hash.py     the hash of what a rule computes, and not of how it is written
runs.py          runs, kept by the hash of their configuration
workers.py       many workers make them together, without a word to each other
experiments/     one file an experiment
rates.py         the same search of the learning rate for every method
intervals.py     intervals over runs that are paired by seed and row
verdicts.py      every claim's verdict, computed from the stored runs
history.py       verdicts whose rule was replaced
more_runs.py     how many runs would decide what is undecided
planned.py       claims that have no experiment yet
verdict_card.py  a claim and its verdict on one screen, for lessons and the page
page.py          the ledger as a page, with page.html
"""
