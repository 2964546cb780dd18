"""Kills and outages under a load whose every change is known."""
