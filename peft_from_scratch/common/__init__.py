"""What all rooms use and none owns.

check.py        the sentences that refuse an argument: name, value, what is allowed
atomic.py       files and folders that appear, and disappear, whole or not at all
records.py      JSON that was left on the disk: read as it stands, or refused by name
digest.py       digests of values, checksums of tensors
statistics.py   intervals: Wilson's, Student's t, bootstraps over rows and seeds
grid.py         grids of learning rates that grow where the best is at an end
units.py        bytes as text
provenance.py   where a number came from: code, packages, machine, seed
scoped.py       changes that undo themselves: modes, random generators, Ctrl-C
load.py         how busy other programs kept the processor
progress.py     the bar of everything that takes long, or lines in a log
quiet.py        transformers without its noise
marks.py        the text between two marks of a page, made anew
lazy.py         names of a package that are imported when they are asked for
"""
