"""The commands of `mpq`, one a file."""
