"""Numbers to a decision: rows, tables, the choice and a page."""
