"""Turn measurements into tables, a choice and a report page."""
