"""Tensors to numbers: accuracy, calibration, agreement, CKA, distances, spectra. Pure functions that never see a zoo."""
