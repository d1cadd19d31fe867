"""Reports of measurements: what was measured, on which machine, and one self-contained page that shows it."""
