"""Pictures of ideas, drawn by code.

Reading order: code_books.py (sixteen values on a number line), page_picture.py (pages
of a paged optimizer during a step), access_picture.py (which program of a kernel reads
which element, and how often).
"""
