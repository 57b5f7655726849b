"""Laws of the methods, one module each, and the table of methods."""
