"""Faces that other libraries know; each module needs its library."""
