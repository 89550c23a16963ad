"""What crosses the middle, as plain numbers: schemes, tables, plans, their sizes. No torch."""
