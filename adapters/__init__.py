"""Adapters: a Plan arrives in a backend, exactly. Import them as ``mpq_plugins.adapters``."""

# This folder lies at the repository's root, so a shell opened there could import it as `adapters`, a name
# that belongs to another distribution and under which its relative imports would break later, less clearly.
if __name__ != "mpq_plugins.adapters":
    raise ImportError(f"this package is mpq_plugins.adapters, not {__name__!r}: import mpq_plugins.adapters")
