"""Tests of one component against real servers."""
