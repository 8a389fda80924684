"""Metrics of a report: estimates, tables and curves of one method."""
