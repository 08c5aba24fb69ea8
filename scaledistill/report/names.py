"""Names of the report's files in a run's folder; imports nothing."""

MAPS_FILE = "maps.json"
REPORT_FILE = "report.html"
