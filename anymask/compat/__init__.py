"""Other interfaces on top of attention(), one file each."""
