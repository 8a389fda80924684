"""From the contents of a report to pages and files; no number is made here."""
