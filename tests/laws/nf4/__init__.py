"""Laws of four bits a value."""
