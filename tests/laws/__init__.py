"""Laws that tests and planted bugs of several files name; by room.

pytest collects what stands under `@law` here. A law without it asks for a method and an
architecture: tests run it on a table of them.
"""
