"""Tensors to numbers: accuracy, calibration, agreement, CKA, distances, spectra. Pure functions of tensors."""
