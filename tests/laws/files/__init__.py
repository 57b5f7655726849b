"""Laws of files: what is saved is what is loaded; what is broken is refused."""
