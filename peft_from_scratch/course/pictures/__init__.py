"""Pictures of ideas, drawn by code: the block with every method at its place, and more.

Reading order: block.py (the one picture of the course; block_words.py has its words),
code_books.py (sixteen values on a number line), page_picture.py (pages of a paged
optimizer during a step), access_picture.py (which program reads what).
"""
