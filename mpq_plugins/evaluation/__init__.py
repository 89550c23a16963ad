"""Many plans of one table: what each costs and loses, and which is worth having."""
