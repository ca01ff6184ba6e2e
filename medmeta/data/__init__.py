"""Scans on disk: patients and millimetres, no learning."""
