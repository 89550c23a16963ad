"""The command `mpq`: the only place where words become objects, results are printed and the process exits."""
