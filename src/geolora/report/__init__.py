"""report.json in, tables and figures out; nothing is computed here."""
