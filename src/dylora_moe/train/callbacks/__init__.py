"""Everything that is not the loop, one file each."""
