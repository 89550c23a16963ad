"""Plans as configurations of other quantizers: the plan's widths and groups, those quantizers' own rounding."""
