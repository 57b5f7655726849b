"""Figures: one look for every method, names that cover nothing, units on every axis.

Reading order: theme.py (colors and the look of each method), draw.py (the parts of a
figure), labels.py (names beside points), curves.py (the figures that lessons are made
of), block.py (the picture of a transformer layer with every method at its place),
roofline.py (the bounds of kernels, drawn), number_line.py (a rule's bands, with what
was measured on them), pages.py and page.css (what pages of one file share).
"""
