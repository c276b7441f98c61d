"""The environment check, the sites and the calibration."""
