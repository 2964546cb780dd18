"""Byte formats of the data topics. Pure: bytes in, values out."""
