"""The main job: several ways to adapt one language model, measured side by side.

Each candidate gets the same base model, task, test rows and seeds, and the settings
that an equal tuning budget found for it. Reading order:

    candidates.py   who is compared: the methods of the one table, and variants of them
    plan.py         what is compared, on what: every result holds it
    setup.py        task and base of a plan, loaded once, and the fingerprint of it all
    own_rows.py     rows of your own: all of them checked, and what so many can tell
    shots.py        how many examples of few-shot fit before them
    adapt.py        a base adapted by one candidate, ready to answer
    measure.py      every figure of one candidate; timing.py times its decoding steps
    tuning.py       the same search of settings for every candidate
    compare.py      the job: search, measure what was not measured yet, summarize, write
    summary.py      the table of a result from the figures of all candidates and seeds
    intervals.py, letters.py    how sure it is, and which methods are told apart
    apart.py        the same, read from a result: what every sentence asks first
    findings.py, background.py, advice.py    a result in words
    columns.py, figures.py, report.py    how a result is shown
    estimate.py     what it all costs on this machine
    reference.py    bitsandbytes' four bits, to be measured beside ours
"""
