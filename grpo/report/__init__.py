"""The report: what a run's folder holds as one HTML page to look at. Standard library and pillow only, no torch."""
