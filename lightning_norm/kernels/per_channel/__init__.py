"""Normalizers whose coefficients are computed channel by channel: rbn, ubn, dbn, cn."""
