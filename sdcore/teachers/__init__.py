"""Whose weights the teacher has."""

from .weights import AdapterOff, Frozen, Live, Teacher, TrustRegion

__all__ = ["AdapterOff", "Frozen", "Live", "Teacher", "TrustRegion"]
