"""Processes: how they start and find each other, and what becomes of one that dies."""
