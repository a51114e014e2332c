"""Normalizers with encoder-decoders: afn and asr."""
