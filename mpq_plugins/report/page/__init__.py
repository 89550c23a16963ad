"""One page about a table and its plans: charts that re-plan in the browser, in one file that needs nothing else."""
