"""What other tools measured or decided, as sensitivities of tables, or as plans."""
