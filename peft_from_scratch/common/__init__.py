"""What all rooms use and none owns: digests, silence, checks, small files."""
