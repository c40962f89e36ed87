"""The run report: the journal as tables, figures and one HTML page."""
