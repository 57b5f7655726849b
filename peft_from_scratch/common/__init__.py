"""What every other room uses and no room owns: digests, silence, checks, small files."""
